r"""What a completion gives as its answer, as text, for counting equal answers.

The last `\boxed{...}`; else what follows the last `####` on its line; else the last number. A
reward reads completions in its own way: this only names answers, and the reward says which names
are equal.
"""

from __future__ import annotations

import re

from nested_reft_mcore.rewards.numeric_match import final_number

MAX_ANSWER_CHARACTERS = 400
"""Longer ones are nobody's answer, and are cut."""
_BOXED = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"[{}]")


def final_answer(text: str) -> str | None:
    """The answer without its mark, or None where there is none."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, rest = text.rpartition("####")
    if mark and rest.strip():
        return rest.strip().splitlines()[0].strip()[:MAX_ANSWER_CHARACTERS]
    number = final_number(text)
    if number is None:
        return None
    return f"{number.value}{'%' if number.is_percentage else ''}"


def _last_boxed(text: str) -> str | None:
    """The content of the last box that is closed and not empty."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for brace in _BRACE.finditer(text, match.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                content = text[match.end() : brace.start()].strip()
                if content:
                    return content[:MAX_ANSWER_CHARACTERS]
                break
    return None
