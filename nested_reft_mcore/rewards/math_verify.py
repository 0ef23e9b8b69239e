"""Reward 1 if a completion's final expression is mathematically the expected one, else 0.

The library math-verify reads LaTeX and plain expressions and compares them with sympy. Its own
timeouts are alarm signals, which break off the main thread; they stay off, and the deadline of the
worker process does their work. Where both sides are plain numbers, `plain_numbers` is asked first:
it says the same, without sympy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import math_verify

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.plain_numbers import same_plain_number

NO_TIMEOUT = 0
"""math-verify's way to say: none."""
CACHED_ANSWERS = 1024
"""The completions of a group have one answer: it is read once."""


def math_verify_reward(item: RewardItem) -> float:
    """1.0 if the completion's expression equals the answer's, else 0.0.

    Of an answer that ends with `#### x`, only x counts. ValueError if the answer cannot be read.
    """
    answer = expected_part(item.answer)
    same = same_plain_number(item.completion, answer)
    if same is not None:
        return float(same)
    return verify_by_library(item.completion, answer)


def expected_part(answer: str) -> str:
    """What is compared with: of a worked answer that ends with `#### x`, x."""
    return answer.rpartition("####")[2].strip()


def verify_by_library(completion: str, answer: str) -> float:
    """The verdict of math-verify alone. ValueError if the answer cannot be read."""
    expected = _read_answer(answer)
    if not expected:
        raise ValueError(f"the answer {answer[:60]!r} cannot be read as mathematics")
    found = math_verify.parse(completion, parsing_timeout=NO_TIMEOUT)
    return float(math_verify.verify(list(expected), found, timeout_seconds=NO_TIMEOUT))


@lru_cache(maxsize=CACHED_ANSWERS)
def _read_answer(answer: str) -> tuple[Any, ...]:
    # Bare LaTeX such as \frac{3}{4} is only recognised inside a mathematical environment.
    marked = answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
    return tuple(math_verify.parse(marked, parsing_timeout=NO_TIMEOUT))
