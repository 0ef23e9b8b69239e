"""Reward 1 if a completion's final expression is mathematically the expected one, else 0.

The library math-verify reads LaTeX and plain expressions and compares them with sympy. Its own
timeouts are alarm signals, which break off the main thread; they stay off, and the deadline of the
worker process does their work.
"""

from __future__ import annotations

import math_verify

from nested_reft_mcore.rewards.base import RewardItem

NO_TIMEOUT = 0
"""math-verify's way to say: none."""


def math_verify_reward(item: RewardItem) -> float:
    """1.0 if the completion's expression equals the answer's, else 0.0.

    Of an answer that ends with `#### x`, only x counts. ValueError if the answer cannot be read.
    """
    answer = item.answer.rpartition("####")[2].strip()
    # Bare LaTeX such as \frac{3}{4} is only recognised inside a mathematical environment.
    marked = answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
    expected = math_verify.parse(marked, parsing_timeout=NO_TIMEOUT)
    if not expected:
        raise ValueError(f"the answer {answer[:60]!r} cannot be read as mathematics")
    found = math_verify.parse(item.completion, parsing_timeout=NO_TIMEOUT)
    return float(math_verify.verify(expected, found, timeout_seconds=NO_TIMEOUT))
