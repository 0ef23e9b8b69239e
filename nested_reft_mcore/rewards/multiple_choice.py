"""Reward 1 if a completion chooses the expected letter, else 0."""

from __future__ import annotations

import re
import string

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.final_answer import last_box

_LEAD = re.compile(
    r"(?i:\b(?:answer|choice|option)\b)(?i:\s+(?:is|should be|would be))?\s*[:=]?\s*"
    r"(?i:(?:option|choice)\s+)?"
)
_BOX_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*")


def multiple_choice(item: RewardItem, *, choices: str = "ABCDE") -> float:
    r"""1.0 if the completion's choice is the answer's, else 0.0.

    `choices` are the letters there are. The choice is the letter that the last `\boxed{...}` begins
    with, or the one behind the last `answer is`, `answer:`, `option` or `####`, or else the last
    capital letter that stands alone: `(B)`, `B.`, `**B**`. Small letters count in a box and where
    nothing else is written. ValueError if the answer is none of the choices.
    """
    letters = choices.upper()
    if not letters or not set(letters) <= set(string.ascii_uppercase):
        raise ValueError(f"choices is {choices!r}; expected letters, as in 'ABCD'")
    expected = chosen_letter(item.answer, letters)
    if expected is None:
        raise ValueError(
            f"the answer {item.answer[:60]!r} is none of the choices {', '.join(letters)}"
        )
    return float(chosen_letter(item.completion, letters) == expected)


def chosen_letter(text: str, letters: str) -> str | None:
    """The letter that a text ends up with, as a capital, or None."""
    either = f"{letters}{letters.lower()}"
    box = last_box(text)
    if box is not None:
        text = _BOX_COMMAND.sub("", box)
        first = re.match(rf"[\s{{($*]*([{either}])(?![A-Za-z])", text)
        return first[1].upper() if first else None
    alone = re.fullmatch(rf"[\s(*]*([{either}])[\s).:*]*", text)
    if alone:
        return alone[1].upper()
    # The article `a` is small: behind a lead only capitals count.
    letter = rf"[\s($*\"']*([{letters}])(?![A-Za-z'])"
    for lead in reversed([*_LEAD.finditer(text), *re.finditer("####", text)]):
        behind = re.match(letter, text[lead.end() : lead.end() + 20])
        if behind:
            return behind[1]
    # `I` and `A` are words too; a sentence does not end with one, nor goes on behind a bracket.
    lonely = re.findall(rf"(?<![A-Za-z'\\])([{letters}])(?=[).:*]|\s*$)", text)
    return lonely[-1] if lonely else None
