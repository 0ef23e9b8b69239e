"""Prompts from JSON lines: questions to train and evaluate on, and requests to `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import DataConfig
from nested_reft_mcore.data.jsonl import Record, is_unicode, read_json_lines
from nested_reft_mcore.data.prompt import Prompt
from nested_reft_mcore.data.tokenizers import Message, Tokenizer

REQUEST_FIELDS = ("prompt", "messages", "prompt_token_ids")
"""A request has exactly one of these."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, in its order."""

    prompts: tuple[Prompt, ...]
    num_dropped: int = 0
    """Prompts left out because they were longer than `max_prompt_length`."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def load_prompts(path: str | Path, config: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    """Read questions with their answers, through the template that `config` names.

    UserError for anything wrong in the file (with `file:line`), and if no prompt is left.
    """
    prompts: list[Prompt] = []
    dropped_lengths: list[int] = []
    for record in read_json_lines(path, config.limit):
        token_ids, text = encode_question(record, config, tokenizer)
        answer = record.number_or_text(config.answer_field)
        if len(token_ids) > config.max_prompt_length:
            dropped_lengths.append(len(token_ids))
        else:
            prompts.append(Prompt(token_ids, text, answer, record.source))
    require_some_left(path, len(prompts), dropped_lengths, config.max_prompt_length)
    return PromptSet(tuple(prompts), len(dropped_lengths))


def encode_question(
    record: Record, config: DataConfig, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], str]:
    """Token ids and text of a line's question, with suffix, system prompt and template."""
    question = record.text(config.prompt_field) + config.prompt_suffix
    if config.template == "chat":
        messages: list[Message] = [{"role": "user", "content": question}]
        if config.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        token_ids = tuple(tokenizer.apply_chat_template(messages))
        text = tokenizer.decode(token_ids)
    else:
        token_ids = tuple(tokenizer.encode(question))
        text = question
    if not token_ids:
        raise record.wrong(config.prompt_field, question, "text of at least one token")
    return token_ids, text


def require_some_left(
    path: str | Path, num_left: int, dropped_lengths: list[int], max_prompt_length: int
) -> None:
    """UserError if every prompt of a file was too long."""
    if num_left == 0:
        raise UserError(
            f"{path}: all {len(dropped_lengths)} prompts are longer than data.max_prompt_length = "
            f"{max_prompt_length} tokens; the shortest has {min(dropped_lengths)}"
        )


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
