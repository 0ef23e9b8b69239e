"""Reward 1 if the last number of a completion is the expected one, else 0."""

from __future__ import annotations

import re

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.final_answer import closing_brace
from nested_reft_mcore.rewards.numbers import NUMBER, Number, first_number, last_number, read_number

_LATEX_COMMA = re.compile(r"\{,\}|,\\[,!]|\\!")
_MARKER = re.compile(r"####|\\f?boxed\s*\{")
_RELATION = re.compile(r"=|\\approx|≈|\\equiv")
_BESIDE = re.compile(
    # What may stand in a box beside the number: words, units and their powers, signs of money,
    # spaces. Single letters of algebra may not.
    r"(?:\\(?:text|textbf|textit|mathrm|mathbf|mbox|rm|displaystyle|left|right|quad|degree|circ)\b"
    r"|\\[,;:!$% ]|(?<=[A-Za-z}])\s*\^\s*(?:[23]|\{[23]\})|\^\s*(?:\\circ|\{\s*\\circ\s*\})"
    r"|\b[A-Za-z]{2,}\b|\b[a-zA-Z]\b(?<![xyzni])|[\s{}.:;~$€£¥°'\"*²³-])*"
)


def numeric_match(item: RewardItem) -> float:
    """1.0 if the completion's final number equals the answer's, else 0.0.

    Numbers are compared as exact fractions, so 43.0 is 43, 1,000 is 1000, 0.75 is 3/4 and 1 1/2 is
    1.5. One written with five or more decimals may be off by a unit of its last place: 0.6666666667
    is 2/3. A percentage counts as written and as hundredths: 50% is both 50 and 0.5. ValueError if
    the answer holds no number.
    """
    expected = final_number(item.answer)
    if expected is None:
        raise ValueError(f"the answer {item.answer[:60]!r} holds no number")
    found = final_number(item.completion)
    return float(found is not None and found.equals(expected))


def final_number(text: str) -> Number | None:
    r"""The number that `text` ends up with, or None.

    After the last `####` that is the first number; in the last `\boxed{...}` the only one, of what
    stands behind the last `=`; without these marks, or where the mark is empty, the last one of the
    text. One too long to be an answer, divided by zero, or part of a root, a power or a product
    with pi counts as none, and so does a box with more than a number and its unit.
    """
    text = _LATEX_COMMA.sub(lambda match: "," if "," in match[0] else "", text)
    *_, mark = [None, *_MARKER.finditer(text)]
    if mark is not None and mark[0] != "####":
        end = closing_brace(text, mark.end())
        box = text[mark.end() : end]
        if box.strip():
            return _number_of_box(box)
    elif mark is not None and NUMBER.search(text, mark.end()):
        return first_number(text, mark.end())
    return last_number(text)


def _number_of_box(box: str) -> Number | None:
    """The number in a box, if it holds one and nothing else that counts."""
    *_, relation = [None, *_RELATION.finditer(box)]
    start = 0 if relation is None else relation.end()
    number = NUMBER.search(box, start)
    if number is None:
        return None
    before, behind = box[start : number.start()], box[number.end() :]
    found = read_number(box, number)
    if found is not None and _BESIDE.fullmatch(before) and _BESIDE.fullmatch(behind):
        return found
    return _mixed_number(box, start)


def _mixed_number(box: str, start: int) -> Number | None:
    """One like 1 1/2, of which the first number found is the whole only."""
    whole, fraction, *more = [*NUMBER.finditer(box, start), None, None][:3]
    if whole is None or fraction is None or more != [None]:
        return None
    between = box[whole.end() : fraction.start()]
    beside = _BESIDE.fullmatch(box[start : whole.start()]) and _BESIDE.fullmatch(
        box[fraction.end() :]
    )
    return read_number(box, fraction) if beside and not between.strip() else None
