"""Reward 1 if a completion's final answer is the expected text, else 0."""

from __future__ import annotations

import unicodedata

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.final_answer import final_answer

_AROUND = " \t\n.,;:!*_`\"'$"
"""Not part of an answer where they stand around it."""


def exact_match(item: RewardItem, *, ignore_case: bool = True, whole: bool = False) -> float:
    r"""1.0 if the completion's final answer is the expected one, letter by letter.

    The final answer is what stands in the last `\boxed{...}`, behind the last `####` or
    `answer is`, or in the last line; with `whole` it is the completion as it is. White space counts
    as one blank, marks around the answer do not count, nor does the case with `ignore_case`, and
    letters are compared in Unicode's form NFKC. ValueError if the data has no answer.
    """
    answer = item.answer if whole else final_answer(item.answer)
    expected = _normal(answer, ignore_case)
    if not expected:
        raise ValueError("the data has no answer for this prompt")
    found = item.completion if whole else final_answer(item.completion)
    return float(_normal(found, ignore_case) == expected)


def _normal(text: str, ignore_case: bool) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).split()).strip(_AROUND)
    return text.casefold() if ignore_case else text
