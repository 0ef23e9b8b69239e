"""Numbers as people and models write them: where they stand in a text, and their exact value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_NUMBER_CHARACTERS = 200
"""Longer numbers are nobody's answer, and arithmetic on them is slow."""
MAX_EXPONENT = 300
"""Largest power of ten in scientific notation, for the same reason."""
ROUNDED_DECIMALS = 5
"""A number written with so many decimals is taken to be rounded."""
FINEST_ROUNDING = Fraction(1, 10**12)
"""Decimals beyond this are noise of binary floating point."""

_MINUS = "-\u2212"
_DIGITS = r"(?:(?<![0-9],)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_POWER = rf"[eE][+-]?[0-9]+|\ ?(?:\\times|\\cdot|\u00d7)\ ?10\^(?:[0-9]|\{{[{_MINUS}+]?[0-9]+\}})"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:{_POWER})?"
_SIGNED = rf"[{_MINUS}+]?{_DECIMAL}"
_SIGN = rf"(?P<sign>(?<![\w)\]}}])[{_MINUS}+])?\\?\$?"
"""A sign belongs to the number unless it stands between two operands, as in 7-3 or x-3."""
NUMBER = re.compile(
    rf"{_SIGN}(?:\\[dtc]?frac(?:\{{(?P<top>{_SIGNED})\}}\{{(?P<bottom>{_SIGNED})\}}"
    r"|\ ?(?P<top_digit>[0-9])(?P<bottom_digit>[0-9]))"
    rf"|(?P<number>{_DECIMAL})(?:\ ?/\ ?(?P<divisor>{_DECIMAL}))?)"
    r"(?P<percent>\ ?\\?%)?"
)
_WHOLE = re.compile(rf"{_SIGN}(?<![\w.,^/])(?P<whole>[0-9]+)\Z")
"""What stands before the fraction of a mixed number, 1 1/2 or 1\\frac{{1}}{{2}}."""
_TIMES_TEN = re.compile(r"\ ?(?:\\times|\\cdot|\u00d7)\ ?10\^")
_LOOK_BACK = 24
_UNIT_POWER = re.compile(r"(?:[A-Za-z]|\\(?:text|mathrm|mbox)\s*\{[^{}]*\})\s*\^\s*\{?\Z")
_NOT_ALONE_BEFORE = re.compile(
    r"(?:[\^_]\s*\{?|\\sqrt(?:\[\w*\])?\s*\{?|√\s*\(?|[0-9)]\s?\*\*)\s*\Z"
)
_NOT_ALONE_BEHIND = re.compile(
    r"\s*(?:\^(?!\s*\{?\s*\\circ)|\\sqrt|√|\\pi|π|\\cdot\s*[A-Za-z\\]|\*\*[0-9(])|[xyzni](?![A-Za-z])"
)


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    """Without regard to a percent sign."""
    tolerance: Fraction
    """One unit of the last place if it looks rounded, else 0."""
    is_percentage: bool

    def equals(self, other: Number) -> bool:
        """Whether the two are the same, as written or with percentages as hundredths."""
        tolerance = max(self.tolerance, other.tolerance)
        if abs(self.value - other.value) <= tolerance:
            return True
        if self.is_percentage == other.is_percentage:
            return False
        return abs(self._hundredths - other._hundredths) <= tolerance / 100

    @property
    def _hundredths(self) -> Fraction:
        """The value with a percent sign taken at its word."""
        return self.value / 100 if self.is_percentage else self.value


def last_number(text: str, start: int = 0, end: int | None = None) -> Number | None:
    """The last number within `text[start:end]`, or None.

    The power of a unit is no number: 5 m^2 ends with 5. A number that is part of a root, a power or
    a multiple of pi is not what the text ends up with: then there is none.
    """
    end = len(text) if end is None else end
    last = None
    for match in NUMBER.finditer(text, start, end):
        if _UNIT_POWER.search(text, max(start, match.start() - _LOOK_BACK), match.start()):
            continue
        last = match
    if last is None:
        return None
    return read_number(text, last)


def first_number(text: str, start: int) -> Number | None:
    """The first number within `text[start:]`, or None."""
    match = NUMBER.search(text, start)
    return None if match is None else read_number(text, match)


def read_number(text: str, match: re.Match[str]) -> Number | None:
    """The number that was matched in `text`; None if it is part of more, or has no sensible value.

    A whole number before a fraction belongs to it: 1 1/2 is 3/2.
    """
    before = text[max(0, match.start() - _LOOK_BACK) : match.start()]
    if _NOT_ALONE_BEFORE.search(before) or _NOT_ALONE_BEHIND.match(text, match.end()):
        return None
    top = _read_decimal(match["top"] or match["top_digit"] or match["number"])
    bottom = _read_decimal(match["bottom"] or match["bottom_digit"] or match["divisor"] or "1")
    if top is None or bottom is None or bottom == 0:
        return None
    is_fraction = match["number"] is None or match["divisor"] is not None
    value, sign = top / bottom, match["sign"]
    if is_fraction and sign is None and 0 < value < 1:
        mixed = _WHOLE.search(before.removesuffix(" ") if match["divisor"] else before.rstrip())
        if mixed is not None and (before.endswith(" ") or match["divisor"] is None):
            value, sign = value + int(mixed["whole"]), mixed["sign"]
    return Number(
        value=-value if sign is not None and sign in _MINUS else value,
        tolerance=Fraction(0) if is_fraction else _rounding(match["number"]),
        is_percentage=match["percent"] is not None,
    )


def _plain(text: str) -> tuple[str, int]:
    """Mantissa and power of ten of a decimal; the power is past the limits if it is unreadable."""
    mantissa, mark, power = _TIMES_TEN.sub("e", text.lower()).partition("e")
    power = power.strip("{}").replace("\u2212", "-")
    if not mark:
        return mantissa, 0
    return mantissa, int(power) if len(power) < 10 else MAX_EXPONENT + 1


def _read_decimal(text: str) -> Fraction | None:
    """A decimal as a fraction; None beyond the size limits."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    mantissa, power = _plain(text)
    if abs(power) > MAX_EXPONENT:
        return None
    return Fraction(mantissa.replace(",", "").replace("\u2212", "-")) * Fraction(10) ** power


def _rounding(text: str) -> Fraction:
    """One unit of a decimal's last place if it has so many that it looks rounded, else 0."""
    mantissa, power = _plain(text)
    decimals = len(mantissa.partition(".")[2]) - power
    if decimals < ROUNDED_DECIMALS or "." not in mantissa:
        return Fraction(0)
    return max(Fraction(1, 10**decimals), FINEST_ROUNDING)
