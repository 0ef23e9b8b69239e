"""Reward 1 if a completion has the wanted form, else 0, whatever it answers."""

from __future__ import annotations

import re
from functools import lru_cache

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.final_answer import count_boxes

STYLES = ("boxed", "hash", "think_answer")
_HASH = re.compile(r"####[ \t]*\S[^\n]*\s*\Z")
_TAGS = re.compile(r"</?(?:think|answer)>")


def response_format(item: RewardItem, *, style: str = "boxed", pattern: str | None = None) -> float:
    r"""1.0 if the completion has the form that was asked for, else 0.0.

    `style`: `boxed`, exactly one `\boxed{...}`, which closes; `hash`, `####` once, with something
    behind it in the last line; `think_answer`, `<think>...</think><answer>...</answer>` and nothing
    around it, each tag once (DeepSeek-R1's, arXiv 2501.12948). A regular expression `pattern` takes
    the place of the style: the whole completion has to match, `.` matches line ends too. ValueError
    for an unknown style or a pattern that is no regular expression.
    """
    text = item.completion
    if pattern is not None:
        return float(_compiled(pattern).fullmatch(text) is not None)
    if style == "boxed":
        return float(count_boxes(text) == (1, True))
    if style == "hash":
        return float(text.count("####") == 1 and _HASH.search(text, text.index("####")) is not None)
    if style == "think_answer":
        return float(_thinks_and_answers(text.strip()))
    raise ValueError(f"style is {style!r}; expected one of {', '.join(STYLES)}")


def _thinks_and_answers(text: str) -> bool:
    tags = list(_TAGS.finditer(text))
    if [tag[0] for tag in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    opening, closing, answer, end = tags
    return (
        opening.start() == 0
        and end.end() == len(text)
        and not text[closing.end() : answer.start()].strip()
        and bool(text[answer.end() : end.start()].strip())
    )


@lru_cache(maxsize=8)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
