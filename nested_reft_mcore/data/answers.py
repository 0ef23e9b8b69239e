"""The final answer within a worked one."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\s*")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
HASHES = "####"


def after_hashes(solution: str) -> str | None:
    """What follows the last `####`, as GSM8K writes it, without commas between digits."""
    _, hashes, answer = solution.rpartition(HASHES)
    answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip())
    return answer if hashes and answer else None


def last_boxed(solution: str) -> str | None:
    r"""What the last `\\boxed{...}` holds, braces within it matched, or None.

    `\\fbox` and `\\framebox` are other commands. `\\boxed 5` holds what follows up to a space or a
    dollar sign.
    """
    for found in reversed(list(_BOXED.finditer(solution))):
        rest = solution[found.end() :]
        held = _braced(rest) if rest.startswith("{") else re.split(r"[\s$]", rest, maxsplit=1)[0]
        if held:
            return held.strip()
    return None


def without_calculator(solution: str) -> str:
    """GSM8K's solution without its calculator marks, `<<48/2=24>>`."""
    return _CALCULATOR.sub("", solution)


def number_text(text: str) -> str:
    """`145.0` as `145`; everything else as it is."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())


def _braced(text: str) -> str | None:
    """What the braces that `text` begins with hold; None if they are not closed."""
    depth = 0
    for place, letter in enumerate(text):
        if letter in "{}" and (place == 0 or text[place - 1] != "\\"):
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return text[1:place]
    return None
