"""The numeric fast path gives math-verify's verdict wherever it gives one, and gives one often."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_reft_mcore.rewards.math_verify import expected_part, verify_by_library
from nested_reft_mcore.rewards.plain_numbers import same_plain_number

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
EDGES = ["0", "-0", "007", "0.5", ".5", "5.", "1e5", "1 234", "12,34", "0.333333", "1,234.50"]
EDGES += ["999,999,999.999999", "100,000,000", "0.1234567", "-0.0", "72.0", "72.000000", "-7"]
NUMBERS: list[Callable[[int], str]] = [
    lambda n: str(n % 401 - 200),
    lambda n: f"{1000 + n % (10**9 - 1000):,}",
    lambda n: f"{n % (2 * 10**8) / 100 - 10**6:.2f}",
    lambda n: f"{n % 10**9 / 10**6:.6f}",
    lambda n: EDGES[n % len(EDGES)],
]
TEXTS = (
    "so the answer is final Answer: I hope it = + - * / $ $$ [ ] ( ) percent % pct apples and "
    "or , . : ; #### ** { } a x = total: is was 5 16 3/4 \\frac{1}{2} \\boxed{3} \\text{a} "
    "\\( \\) \\[ \\] ! > < # ' \u20ac \u0663 \u017f \u00a0"
)
WORDS = TEXTS.split(" ")
LEADS = [
    *("#### ", "The answer is ", "answer: ", "Answer: ", "The final answer is ", "so x = "),
    *("Final Answer: ", "costs $", "The answer is **", "The answer is $", "is\n", "", " ", "= "),
    *("the answer is: ", "answer = ", "\\boxed{", "$\\boxed{", "\\(\\boxed{", "\\[\\boxed{"),
    *("$$\\boxed{", "The final answer is $\\boxed{", "The final answer is: \\boxed{"),
    "an\u017fwer ",
]
ENDS = [
    *("", "", "}", "}", "}$", "}$.", "}\\)", "}\\].", "}$$", "**", "**.", ".", "\n"),
    *("} apples\nin total, 5 of 7", "} percent", "$ I hope", " = 3", "} x}", " dollars.", "%"),
    "} $\\frac{1}{2}$",
]
BYTES_OF_ONE, CASES, EXAMPLES = 64, 40, 80


class Choices:
    """Choices that bytes make: Hypothesis draws them all at once, in a tenth of the time."""

    def __init__(self, data: bytes) -> None:
        self._bytes = iter(data)

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[next(self._bytes) % len(options)]

    def number(self) -> str:
        write = self.one_of(NUMBERS)
        return write(int.from_bytes(bytes(next(self._bytes) for _ in range(4)), "big"))

    def case(self) -> tuple[str, str]:
        """A completion and the answer it is compared with, the right one every second time."""
        answer, other = self.number(), self.number()
        blank = self.one_of([" ", " ", "\n", ""])
        parts = [
            self.number() if self.one_of(range(4)) == 0 else self.one_of(WORDS)
            for _ in range(self.one_of(range(9)))
        ]
        said = self.one_of([answer, other])
        return blank.join([*parts, ""]) + self.one_of(LEADS) + said + self.one_of(ENDS), answer


@settings(
    max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None, database=None
)
@given(st.binary(min_size=CASES * BYTES_OF_ONE, max_size=CASES * BYTES_OF_ONE))
def test_same_verdict_as_math_verify(data):
    for start in range(0, len(data), BYTES_OF_ONE):
        completion, answer = Choices(data[start : start + BYTES_OF_ONE]).case()
        found = same_plain_number(completion, answer)
        if found is not None:
            assert verify_by_library(completion, answer) == float(found), (completion, answer)


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
