"""The numeric fast path gives math-verify's verdict wherever it gives one, and gives one often."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_reft_mcore.rewards.math_verify import expected_part, verify_by_library
from nested_reft_mcore.rewards.plain_numbers import same_plain_number

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
EDGES = ["0", "-0", "007", "0.5", ".5", "5.", "1e5", "1 234", "12,34", "0.333333", "1,234.50"]
EDGES += ["999,999,999.999999", "100,000,000", "0.1234567", "-0.0", "72.0", "72.000000", "-7"]
NUMBERS = st.one_of(
    st.integers(-200, 200).map(str),
    st.integers(1000, 10**9 - 1).map("{:,}".format),
    st.decimals(-(10**6), 10**6, places=2).map(str),
    st.integers(0, 10**9).map(lambda n: f"{n / 10**6:.6f}"),
    st.sampled_from(EDGES),
)
TEXTS = (
    "so the answer is final Answer: I hope it = + - * / $ $$ [ ] ( ) percent % pct apples and "
    "or , . : ; #### ** { } a x = total: is was 5 16 3/4 \\frac{1}{2} \\boxed{3} \\text{a} "
    "\\( \\) \\[ \\] ! > < # ' \u20ac \u0663 \u017f \u00a0"
)
WORDS = st.sampled_from(TEXTS.split(" "))
LEADS = st.sampled_from(
    [
        *("#### ", "The answer is ", "answer: ", "Answer: ", "The final answer is ", "so x = "),
        *(
            "Final Answer: ",
            "costs $",
            "The answer is **",
            "The answer is $",
            "is\n",
            "",
            " ",
            "= ",
        ),
        *("the answer is: ", "answer = ", "\\boxed{", "$\\boxed{", "\\(\\boxed{", "\\[\\boxed{"),
        *(
            "$$\\boxed{",
            "The final answer is $\\boxed{",
            "The final answer is: \\boxed{",
            "an\u017fwer ",
        ),
    ]
)
ENDS = st.sampled_from(
    [
        *("", "", "}", "}", "}$", "}$.", "}\\)", "}\\].", "}$$", "**", "**.", ".", "\n"),
        *("} apples\nin total, 5 of 7", "} percent", "$ I hope", " = 3", "} x}", " dollars.", "%"),
        "} $\\frac{1}{2}$",
    ]
)


@st.composite
def completions(draw: st.DrawFn, number: str) -> str:
    blank = draw(st.sampled_from([" ", " ", "\n", ""]))
    before = blank.join(draw(st.lists(WORDS | NUMBERS, max_size=8)))
    return before + blank + draw(LEADS) + number + draw(ENDS)


@settings(max_examples=2000, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.data(), NUMBERS, NUMBERS, st.booleans())
def test_same_verdict_as_math_verify(data, answer, other, is_right):
    completion = data.draw(completions(answer if is_right else other))
    found = same_plain_number(completion, answer)
    if found is not None:
        assert verify_by_library(completion, answer) == float(found)


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("work 3 + 4\n#### 7", "7", True),
        ("The answer is 1,234.", "1234.0", True),
        (r"The final answer is: $\boxed{72}$.", "72", True),
        (r"\boxed{72} apples, 5 of them red", "27", False),
        (r"\boxed{72} percent", "72", None),
        (r"\boxed{7} or \boxed{8}", "8", None),
        ("in 16 500", "500", None),
        ("12 - 5", "5", None),
        ("The answer: 7, another answer: 8", "8", None),
        ("the answer is 5, not 7", "7", None),
        (r"The final answer is $5$, \boxed{7}", "7", None),
        ("#### 7", "7/1", None),
    ],
)
def test_where_it_has_a_verdict(completion, answer, verdict):
    assert same_plain_number(completion, answer) is verdict


@pytest.mark.skipif(not GSM8K.is_file(), reason="../shared/data is not there")
def test_gsm8k_is_judged_without_the_library():
    """All answers in the three usual forms have a verdict; a sample of them is math-verify's."""
    answers = [
        expected_part(json.loads(line)["answer"])
        for line in GSM8K.read_text(encoding="utf-8").splitlines()
    ]
    others = answers[1:] + answers[:1]
    draw = random.Random(0)
    for answer, other in zip(answers, others, strict=True):
        for form in ("so\n#### {}", "Thus $\\boxed{{{}}}$.", "The answer is {}."):
            assert same_plain_number(form.format(answer), answer) is True
            wrong = same_plain_number(form.format(other), answer)
            assert wrong is (other.replace(",", "") == answer.replace(",", ""))
            if draw.random() < 0.1:
                assert verify_by_library(form.format(other), answer) == float(wrong)
