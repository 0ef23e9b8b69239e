"""Reward 1 if the last number of a completion is the expected one, else 0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from nested_reft_mcore.rewards.base import RewardItem

MAX_NUMBER_CHARACTERS = 200
"""Longer numbers are nobody's answer, and arithmetic on them is slow."""
MAX_EXPONENT = 300
"""Largest power of ten in scientific notation, for the same reason."""
ROUNDED_DECIMALS = 5
"""A number written with so many decimals is taken to be rounded."""
FINEST_ROUNDING = Fraction(1, 10**12)
"""Decimals beyond this are noise of binary floating point."""

_DIGITS = r"(?:(?<![0-9],)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(
    # A sign belongs to the number unless it stands between two operands, as in 7-3 or x-3.
    r"(?P<sign>(?<![\w)\]}])[+\-\u2212])?\\?\$?"
    rf"(?:\\[dt]?frac\{{(?P<top>{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}}"
    rf"|(?P<number>{_DECIMAL})(?:\ ?/\ ?(?P<divisor>{_DECIMAL}))?)"
    r"(?P<percent>\ ?\\?%)?"
)
_LATEX_COMMA = re.compile(r"\{,\}|,\\[,!]|\\!")
_BRACE = re.compile(r"[{}]")
_MARKER = re.compile(r"####|\\boxed\{")


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    """Without regard to a percent sign."""
    tolerance: Fraction
    """One unit of the last place if it looks rounded, else 0."""
    is_percentage: bool


def numeric_match(item: RewardItem) -> float:
    """1.0 if the completion's final number equals the answer's, else 0.0.

    Numbers are compared as exact fractions, so 43.0 is 43, 1,000 is 1000 and 0.75 is 3/4. One
    written with five or more decimals may be off by a unit of its last place: 0.6666666667 is
    2/3. A percentage counts as written and as hundredths: 50% is both 50 and 0.5. ValueError if
    the answer holds no number.
    """
    expected = final_number(item.answer)
    if expected is None:
        raise ValueError(f"the answer {item.answer[:60]!r} holds no number")
    found = final_number(item.completion)
    return float(found is not None and _equal(found, expected))


def final_number(text: str) -> Number | None:
    r"""The number that `text` ends up with, or None.

    After the last `####` that is the first number, in the last `\boxed{...}` the last one; without
    these marks, or where no number follows them, the last one of the text. One too long to be an
    answer, or divided by zero, counts as none.
    """
    text = _LATEX_COMMA.sub(lambda match: "," if "," in match[0] else "", text)
    *_, mark = [None, *_MARKER.finditer(text)]
    if mark is not None:
        if mark[0] == "####":
            match = _NUMBER.search(text, mark.end())
        else:
            match = _last_match(text, mark.end(), _closing_brace(text, mark.end()))
        if match is not None:
            return _read(match)
    match = _last_match(text, 0, len(text))
    return None if match is None else _read(match)


def _last_match(text: str, start: int, end: int) -> re.Match[str] | None:
    """The last number within `text[start:end]`."""
    last = None
    for match in _NUMBER.finditer(text, start, end):
        last = match
    return last


def _closing_brace(text: str, start: int) -> int:
    """Where the brace that was opened just before `start` closes; the end if it never does."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(text)


def _read(match: re.Match[str]) -> Number | None:
    """The number that was matched; None if it has no sensible value."""
    top = _read_decimal(match["top"] or match["number"])
    bottom = _read_decimal(match["bottom"] or match["divisor"] or "1")
    if top is None or bottom is None or bottom == 0:
        return None
    is_fraction = bool(match["bottom"] or match["divisor"])
    sign = -1 if match["sign"] in {"-", "\u2212"} else 1
    return Number(
        value=sign * top / bottom,
        tolerance=Fraction(0) if is_fraction else _rounding(match["number"]),
        is_percentage=match["percent"] is not None,
    )


def _read_decimal(text: str) -> Fraction | None:
    """A decimal as a fraction; None beyond the size limits."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    _, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_EXPONENT:
        return None
    return Fraction(text.replace(",", ""))


def _rounding(text: str) -> Fraction:
    """One unit of a decimal's last place if it has so many that it looks rounded, else 0."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    if decimals < ROUNDED_DECIMALS or "." not in mantissa:
        return Fraction(0)
    return max(Fraction(1, 10**decimals), FINEST_ROUNDING)


def _equal(found: Number, expected: Number) -> bool:
    """Whether two numbers are the same, as written or with percentages as hundredths."""
    tolerance = max(found.tolerance, expected.tolerance)
    if abs(found.value - expected.value) <= tolerance:
        return True
    if found.is_percentage == expected.is_percentage:
        return False
    return abs(_hundredths(found) - _hundredths(expected)) <= tolerance / 100


def _hundredths(number: Number) -> Fraction:
    """The value with a percent sign taken at its word."""
    return number.value / 100 if number.is_percentage else number.value
