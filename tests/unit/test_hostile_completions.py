"""Completions that are out to hurt the verifier: one item each, and the run goes on."""

import os
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reward_cases import MARK, left_after

from nested_reft_mcore.config.rewards import RewardFunctionConfig
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.pool import RewardPool
from nested_reft_mcore.rewards.registry import load_reward
from nested_reft_mcore.rewards.worker import judge

HOSTILE = {
    "power tower": r"$10**10**10$ and \boxed{10^{10^{10}}}",
    "factorials": r"\boxed{((((9!)!)!)!)!}",
    "nested braces": "{" * 200 + "5" + "}" * 200,
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 200 + "5" + "}" * 201,
    "megabyte of digits": "9" * 1_000_000,
    "boxed megabyte": r"\boxed{" + "9" * 1_000_000 + "}",
    "null bytes": "\0\0 \\boxed{5\0}",
    "lone surrogates": "\ud800 \\boxed{\udfff}",
    "right-to-left marks": "\u202e\\boxed{\u200f6\u200e}\u202c",
    "unbalanced": r"$\boxed{\frac{1}{\left( $$ \[ \begin{matrix} 5",
    "thousands of boxes": r"\boxed{5} " * 4000,
    "parentheses": "(" * 5000 + "5" + ")" * 5000,
    "minus signs": "-" * 10_000 + "5",
}
OURS = ("numeric_match", "exact_match", "multiple_choice", "format")
DEADLINE = 2.0


def test_each_costs_at_most_its_own_item():
    names = ("math_verify", "numeric_match", "exact_match", "format")
    functions = [RewardFunctionConfig(name=name) for name in names]
    good = RewardItem("", r"it is \boxed{5}", "5")
    items = [item for text in HOSTILE.values() for item in (RewardItem("", text, "5"), good)]
    with RewardPool(functions, 2, deadline_seconds=DEADLINE) as pool:
        results = pool.score(items)
        assert (pool.timeouts + pool.errors) == sum(r.error is not None for r in results)
    assert [result.value for result in results[1::2]] == [4.0] * len(HOSTILE)
    verdicts = dict(zip(HOSTILE, results[::2], strict=True))
    for name, result in verdicts.items():
        # Our own functions are linear: they judge all of it, in time.
        assert result.error is None or result.error.startswith("math_verify: "), name
        assert ";" not in (result.error or ""), name
        if result.error is not None:
            assert result.value == 0.0, name
    assert verdicts["power tower"].components == (0.0, 0.0, 0.0, 1.0)
    assert verdicts["right-to-left marks"].components == (0.0, 0.0, 0.0, 1.0)
    assert verdicts["thousands of boxes"].components[1:] == (1.0, 1.0, 0.0)


FRAGMENTS = (
    *(
        "\\boxed{",
        "\\frac{",
        "{",
        "}",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "#### ",
        "answer is ",
    ),
    *("\\sqrt", "^", "_", "/", "*", "**", "!", "=", "<", ",", ".", "-", "%", " ", "\n", "\\text{"),
    *(
        "5",
        "72",
        "1,234",
        "0.5",
        "3/4",
        "\\pi",
        "x",
        "\\le",
        "\\infty",
        "\\begin{pmatrix}",
        "&",
        "\\\\",
    ),
    *("\0", "\ud800", "\u202e", "\u0663", "é", "∞", "√", "(", ")", "[", "]", "|", "I hope", "and"),
)
BATCH, BATCHES = 50, 200
MOST_PIECES = 12
BYTES_OF_ONE = 1 + 2 * MOST_PIECES


def completions_of(data: bytes) -> list[str]:
    """`BATCH` texts of up to `MOST_PIECES` fragments and characters of any kind.

    Hypothesis draws the bytes at once: to draw every fragment takes longer than to judge it.
    """
    texts = []
    for start in range(0, BATCH * BYTES_OF_ONE, BYTES_OF_ONE):
        count, *rest = data[start : start + BYTES_OF_ONE]
        pieces = map(piece_of, rest[::2], rest[1::2])
        texts.append("".join(islice(pieces, count % (MOST_PIECES + 1))))
    return texts


def piece_of(high: int, low: int) -> str:
    """A fragment; one time in four any character, lone surrogates and control characters too."""
    if high % 4:
        return FRAGMENTS[(high * 256 + low) % len(FRAGMENTS)]
    return chr(low // 2) if low % 2 else chr((high // 4 * 256 + low) * 4 + high % 3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    mark = str(tmp_path_factory.mktemp("mark"))
    os.environ[MARK] = mark
    with RewardPool("math_verify", 2, deadline_seconds=10.0) as pool:
        yield pool
    del os.environ[MARK]
    assert left_after(mark, 0) == set()


@settings(
    max_examples=BATCHES, suppress_health_check=list(HealthCheck), database=None, deadline=None
)
@given(data=st.binary(min_size=BATCH * BYTES_OF_ONE, max_size=BATCH * BYTES_OF_ONE))
def test_ten_thousand_completions_raise_nothing(pool, data):
    """math-verify in the pool; our own rewards here, through what a worker calls."""
    texts = completions_of(data)
    items = [RewardItem("", text, "5") for text in texts]
    for result in pool.score(items):
        assert result.value in (0.0, 1.0)
        assert result.error is None, result.error
    for name in OURS:
        reward = load_reward(name)
        for text in texts:
            values, error = judge(reward, [RewardItem("", text, "B" if "choice" in name else "5")])
            assert error is None
            assert values in ([0.0], [1.0])
