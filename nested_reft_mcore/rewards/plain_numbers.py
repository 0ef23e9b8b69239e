r"""math-verify's verdict where both sides are plain numbers, without reading them as LaTeX.

A plain number is -12, 1,234 or 3.50: up to nine digits (any number of thousands groups of three
stays within them) and six decimals, so that binary floating point and rounding to six decimals,
which math-verify does, change no verdict. Where the text is of another form, or which number
math-verify would pick is not certain, there is no verdict here and math-verify has to say.

What math-verify picks, and so what is certain here:

- It looks for its highest priority that is found at all: `final answer is ... I hope`; boxes and
  `final answer is`; `answer:`; `answer`; any expression. Within a priority it takes the match that
  ends last. So a single box decides, unless `final answer` points elsewhere, and what stands behind
  it may be words but no mathematics, nor a percent sign.
- Without a box, and without LaTeX, the last number of the text decides, if it stands where
  math-verify sees a number: behind a blank or `=`, maybe bold or with a dollar sign, and if what
  stands before it can be no part of it: 16 500 is a thousands group and 12 - 5 an expression.
"""

from __future__ import annotations

import re
from decimal import Decimal

_PLAIN = r"-?(?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2}|0|[1-9][0-9]{0,8})(?:\.[0-9]{1,6})?"
_NUMBER = re.compile(_PLAIN)
_BOXED = re.compile(
    rf"\\boxed\{{\s?(?P<number>{_PLAIN})\s?\}}"
    # Only words behind it, and the end of the formula that it stands in.
    r"(?:\$\$?|\s?\\\)|\s?\\\])?[.,]?(?:\s[A-Za-z0-9 .,;:!?'\n-]*)?\Z"
)
_LAST = re.compile(
    r"(?:\A|(?:[A-Za-z#:>!?]|[A-Za-z]\.)\s{1,3}|[A-Za-z#:>\s]=\s?)"
    rf"(?:\*\*)?\$?(?P<number>{_PLAIN})(?:\*\*)?\.?\s?\Z"
)
_ANSWER = re.compile(r"(?i:answer)")
_FINAL = re.compile(r"(?i:final answer)")
_BETWEEN = re.compile(r"[A-Za-z :*#\n]*=?[ ]?(?:\*\*)?\$?")
_BEFORE_BOX = re.compile(r"(?i:final answer is):?\s?(?:\$\$?|\\\(|\\\[)?\Z")
_PERCENT = re.compile(r"(?i:perc|pct)")
_TAIL = 80
"""A final number is looked for in so many characters at the end."""


def same_plain_number(completion: str, answer: str) -> bool | None:
    """Whether math-verify would call the completion's number the answer's; None if not certain."""
    if not _NUMBER.fullmatch(answer):
        return None
    found = final_plain_number(completion)
    return None if found is None else _value(found) == _value(answer)


def final_plain_number(text: str) -> str | None:
    """The plain number that math-verify would take from a text, as written; None if not certain."""
    if "\\fbox" in text or "I hope" in text:
        return None
    place = text.find("\\boxed")
    return _boxed_number(text, place) if place >= 0 else _last_number(text)


def _boxed_number(text: str, place: int) -> str | None:
    match = _BOXED.match(text, place)
    if match is None or _PERCENT.search(text, match.end("number")):
        return None
    finals = [final.start() for final in _FINAL.finditer(text)]
    if finals and (len(finals) > 1 or not _BEFORE_BOX.match(text[finals[0] : place])):
        return None
    return match["number"]


def _last_number(text: str) -> str | None:
    if "\\" in text:
        return None
    match = _LAST.search(text, max(0, len(text) - _TAIL))
    if match is None:
        return None
    leads = [lead.end() for lead in _ANSWER.finditer(text)]
    if leads and (len(leads) > 1 or not _BETWEEN.fullmatch(text[leads[0] : match.start("number")])):
        return None
    return match["number"]


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
