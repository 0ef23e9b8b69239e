r"""Where a completion says its answer: the last `\boxed{...}`, or behind the last `####`."""

from __future__ import annotations

import re

_BRACE = re.compile(r"\\?[{}]")
_BOX = re.compile(r"\\f?boxed\s*\{")
_LEAD = re.compile(
    r"(?i:\bfinal answer|\banswer)(?:\s+is)?\s*[:=]?\s*(?P<rest>\S[^\n]*)|(?P<hash>####)"
)


def closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace that was opened just before `start` closes; None if it never does.

    `\{` and `\}` are braces that are printed, and open nothing.
    """
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return brace.start()
    return None


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}`; to the end if it is never closed."""
    *_, box = [None, *_BOX.finditer(text)]
    if box is None:
        return None
    return text[box.end() : closing_brace(text, box.end())]


def count_boxes(text: str) -> tuple[int, bool]:
    r"""Number of `\boxed{` and `\fbox{`, and whether the last one closes."""
    boxes = list(_BOX.finditer(text))
    return len(boxes), bool(boxes) and closing_brace(text, boxes[-1].end()) is not None


def final_answer(text: str) -> str:
    r"""The answer that a text ends up with, as it is written.

    In this order: the last box; the line behind the last `####` or `answer is`; the last line that
    is not empty.
    """
    box = last_box(text)
    if box is not None:
        return box.strip()
    *_, lead = [None, *_LEAD.finditer(text)]
    if lead is not None:
        behind = lead["rest"] or text[lead.end() :].lstrip().partition("\n")[0]
        if behind.strip():
            return behind.strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
