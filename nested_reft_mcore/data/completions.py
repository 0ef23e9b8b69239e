"""Completions from JSON lines, for `score`: as token ids, or as texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.jsonl import read_json_lines
from nested_reft_mcore.data.records import Record
from nested_reft_mcore.data.requests import token_id_list
from nested_reft_mcore.data.tokenizers import Tokenizer

ID_FIELDS = ("prompt_token_ids", "token_ids")
"""A line has both of these, ..."""
TEXT_FIELDS = ("prompt", "text")
"""... or, with no ids at all, both of these."""


@dataclass(frozen=True)
class GivenCompletion:
    """A prompt and what followed it."""

    prompt_token_ids: tuple[int, ...]
    """At least one."""
    token_ids: tuple[int, ...]
    """The completion; may be empty."""
    source: str
    """Where it came from, as `file:line`."""


def read_completions(
    path: str | Path, get_tokenizer: Callable[[], Tokenizer], vocab_size: int
) -> list[GivenCompletion]:
    """Completions of a file: what `generate` wrote, or lines with the texts `prompt` and `text`.

    Ids win where a line has both. Texts are tokenized apart, with no special token added;
    `get_tokenizer` is called only if there are some. `vocab_size` is the model's. UserError with
    `file:line` for a line that says neither, or holds an id that the model lacks.
    """
    completions = []
    for record in read_json_lines(path):
        if all(record.has(name) for name in ID_FIELDS):
            prompt, completion = (token_id_list(record, name, vocab_size - 1) for name in ID_FIELDS)
        elif all(record.has(name) for name in TEXT_FIELDS) and not record.has("token_ids"):
            tokenizer = get_tokenizer()
            prompt, completion = (
                tuple(tokenizer.encode(record.text(name))) for name in TEXT_FIELDS
            )
        else:
            raise _incomplete(record)
        if not prompt:
            raise UserError(
                f"{record.source}: the prompt has no tokens; expected at least one, for the "
                "completion's first token is scored given what is before it"
            )
        completions.append(GivenCompletion(prompt, completion, record.source))
    return completions


def _incomplete(record: Record) -> UserError:
    return UserError(
        f"{record.source}: found {sorted(record.fields)[:12]}; expected "
        f"{' and '.join(ID_FIELDS)}, or the texts {' and '.join(TEXT_FIELDS)}"
    )
