"""Questions that stand twice in a set, or both in what is trained and in what is evaluated on."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence

from nested_reft_mcore.data.prompt import Prompt

_SHOWN = 3
_SIGNS = re.compile(r"[.,;:?](?!\d)")

_log = logging.getLogger(__name__)

Pair = tuple[Prompt, Prompt]


def question_key(text: str) -> str:
    """A question as it is compared: compatible characters made one, no case, single spaces.

    Sentences' signs are left out, but not those within numbers: some sets are cut into words, as
    `left ?` for `left?`, and some leave points out.
    """
    plain = _SIGNS.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(plain.split())


def find_duplicates(prompts: Sequence[Prompt]) -> list[Pair]:
    """Every prompt whose question came before, with the first one that asked it."""
    first: dict[str, Prompt] = {}
    pairs = []
    for prompt in prompts:
        known = first.setdefault(_key(prompt), prompt)
        if known is not prompt:
            pairs.append((prompt, known))
    return pairs


def find_overlap(training: Sequence[Prompt], evaluation: Sequence[Prompt]) -> list[Pair]:
    """Every training prompt whose question is evaluated on, with the evaluation prompt."""
    held_out = {_key(prompt): prompt for prompt in reversed(evaluation)}
    found = ((prompt, held_out.get(_key(prompt))) for prompt in training)
    return [(prompt, other) for prompt, other in found if other is not None]


def report_overlap(training: Sequence[Prompt], evaluation: Sequence[Prompt]) -> dict[str, float]:
    """Warn of duplicates and of training prompts that are evaluated on; returns their numbers."""
    duplicates = find_duplicates(training)
    overlap = find_overlap(training, evaluation)
    for pairs, what in (
        (duplicates, "training prompts stand there before"),
        (overlap, "training prompts are also evaluated on"),
    ):
        if pairs:
            places = "; ".join(f"{one.source} = {other.source}" for one, other in pairs[:_SHOWN])
            more = f", and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
            _log.warning("%d %s: %s%s", len(pairs), what, places, more)
    return {
        "data/num_duplicates": float(len(duplicates)),
        "data/num_eval_overlap": float(len(overlap)),
    }


def _key(prompt: Prompt) -> str:
    return question_key(prompt.question or prompt.text)
