"""Reward 1 if a completion's final expression is mathematically the expected one, else 0.

The library math-verify reads LaTeX and plain expressions and compares them with sympy. Its own
timeouts are alarm signals, which break off the main thread; they stay off, and the deadline of the
worker process does their work. Where both sides are plain numbers, `plain_numbers` is asked first:
it says the same, without sympy.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import math_verify

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.plain_numbers import same_plain_number

NO_TIMEOUT = 0
"""math-verify's way to say: none."""
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)\s*\Z")
_DOLLAR = re.compile(r"(?<!\\)\$")
CACHED_ANSWERS = 1024
"""The completions of a group have one answer: it is read once."""


def math_verify_reward(item: RewardItem) -> float:
    """1.0 if the completion's expression equals the answer's, else 0.0.

    Of an answer that ends with `#### x` only x counts, and so it is with a completion that has no
    box: by itself math-verify would rather read what stands behind a word such as "answered".
    ValueError if the answer cannot be read.
    """
    answer, completion = expected_part(item.answer), final_part(item.completion)
    same = same_plain_number(completion, answer)
    if same is not None:
        return float(same)
    return verify_by_library(completion, answer)


def final_part(completion: str) -> str:
    """What is judged: of a completion whose last line is `#### x`, and without a box, x."""
    place = completion.rfind("####")
    if place < 0 or "\\boxed" in completion:
        return completion
    last = _HASHES.match(completion, place)
    return completion if last is None else last[1]


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


def warm_up() -> None:
    """Load what math-verify and sympy load when they are first used."""
    for text in (r"$\frac{1}{2}$", r"\boxed{x^2 + \sqrt{3}}", "the answer is 0.5"):
        verify_by_library(text, text)


@lru_cache(maxsize=CACHED_ANSWERS)
def _read_answer(answer: str) -> tuple[Any, ...]:
    # Bare LaTeX such as \frac{3}{4} is only recognised inside a mathematical environment.
    is_marked = "\\boxed" in answer or _DOLLAR.search(answer) is not None
    boxed = f"\\boxed{{{answer}}}"
    found = math_verify.parse(answer if is_marked else boxed, parsing_timeout=NO_TIMEOUT)
    if not found and is_marked:
        # Dollar signs that pair with nothing, as in a formula broken over two lines.
        found = math_verify.parse(boxed, parsing_timeout=NO_TIMEOUT)
    return tuple(found)
