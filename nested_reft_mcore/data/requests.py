"""Requests to `generate`, from JSON lines."""

from __future__ import annotations

from pathlib import Path

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.jsonl import read_json_lines
from nested_reft_mcore.data.prompt import Prompt
from nested_reft_mcore.data.records import Record, is_unicode
from nested_reft_mcore.data.tokenizers import Tokenizer

REQUEST_FIELDS = ("prompt", "messages", "prompt_token_ids")
"""A request has exactly one of these."""


def read_requests(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Prompts of `generate`: lines with `prompt`, `messages` or `prompt_token_ids`, none dropped.

    `vocab_size` is the model's, where it is larger than the tokenizer's. An `answer` is kept if it
    is there. UserError with `file:line` for a line that says nothing, or more than one thing.
    """
    largest = (vocab_size or tokenizer.vocab_size) - 1
    return [_request(record, tokenizer, largest) for record in read_json_lines(path, limit)]


def _request(record: Record, tokenizer: Tokenizer, largest_id: int) -> Prompt:
    """One line of a request file."""
    given = [name for name in REQUEST_FIELDS if record.has(name)]
    if len(given) != 1:
        raise UserError(
            f"{record.source}: found {given or sorted(record.fields)[:12]}; expected exactly one "
            f"of {', '.join(REQUEST_FIELDS)}"
        )
    if given == ["prompt"]:
        text = record.text("prompt")
        token_ids = tuple(tokenizer.encode(text))
    elif given == ["messages"]:
        token_ids = _encode_messages(record, tokenizer)
        text = tokenizer.decode(token_ids)
    else:
        token_ids = token_id_list(record, "prompt_token_ids", largest_id)
        text = tokenizer.decode(token_ids)
    if not token_ids:
        raise UserError(f"{record.source}: the prompt has no tokens; expected at least one")
    answer = record.number_or_text("answer") if record.has("answer") else None
    return Prompt(token_ids, text, answer, record.source)


def token_id_list(record: Record, key: str, largest_id: int) -> tuple[int, ...]:
    """The token ids under `key`; UserError unless all are integers within the vocabulary."""
    values = record.array(key)
    for value in values:
        if type(value) is not int or not 0 <= value <= largest_id:
            raise record.wrong(key, value, f"token ids from 0 to {largest_id}")
    return tuple(values)


def _encode_messages(record: Record, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The chat under `messages`; UserError unless each turn has a role and content as strings."""
    turns = record.array("messages")
    for turn in turns:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(name), str) for name in ("role", "content")
        ):
            raise record.wrong("messages", turn, "turns of the form {role: ..., content: ...}")
        if not is_unicode(turn["content"]):
            raise record.wrong("messages", turn, "text without lone surrogates")
    try:
        return tuple(tokenizer.apply_chat_template(turns))
    except UserError as error:
        raise UserError(f"{record.source}: {error}") from error
