"""From a question to what the policy reads: template, examples, suffix, and the longest prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nested_reft_mcore.config.data import DataConfig, DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.chat_template import check_template
from nested_reft_mcore.data.records import BrokenRow, BrokenRows, OnBroken, Record, refuse
from nested_reft_mcore.data.rows import RowReader
from nested_reft_mcore.data.sources import read_rows
from nested_reft_mcore.data.tokenizers import Message, Tokenizer

Extracted = TypeVar("Extracted")


@dataclass(frozen=True)
class EncodedRow(Generic[Extracted]):
    """A row whose question is tokenized."""

    record: Record
    question: str
    """Alone: no template, suffix or examples."""
    token_ids: tuple[int, ...]
    """What the policy reads; at least one."""
    text: str
    """The same, as text."""
    extracted: Extracted
    """What else was asked of the row."""


@dataclass
class RowCounts:
    """What was left out of a source, or changed."""

    dropped: int = 0
    """Prompts left out because they were longer than `max_prompt_length`."""
    truncated: int = 0
    """Prompts that lost their beginning for the same reason."""
    broken: int = 0
    """Rows that could not be used."""


class PromptEncoder:
    """Puts questions into the form that `config` describes."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        """Read the template's file and the examples.

        Raises:
            UserError: a file is missing or broken, there are too few examples, or `add_bos` is set
                and the tokenizer has no beginning of sequence.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._template = _read_template(config.template_path)
        self._shots = _read_shots(config)
        self._is_template_checked = False
        self._bos: tuple[int, ...] = ()
        if config.add_bos and config.template == "none":
            if tokenizer.bos_token_id is None:
                raise UserError(
                    "data.add_bos=true: the tokenizer has no beginning-of-sequence token; expected "
                    "one, or data.add_bos: false"
                )
            self._bos = (tokenizer.bos_token_id,)

    @property
    def template_path(self) -> str | None:
        """The file that the chat template is from; None where it is the tokenizer's."""
        return self._config.template_path

    def encode(self, question: str) -> tuple[tuple[int, ...], str]:
        """Token ids and text of a question. UserError where the chat template refuses it."""
        config, suffix = self._config, self._config.prompt_suffix
        shots = [shot for shot in self._shots if shot[0].strip() != question.strip()]
        shots = shots[: config.num_few_shot]
        if config.template == "chat":
            messages = _messages(config.system_prompt, shots, question, suffix)
            token_ids = self._apply(messages)
            if token_ids and not self._is_template_checked:
                self._check_template(messages, token_ids)
                self._is_template_checked = True
            return token_ids, self._tokenizer.decode(token_ids)
        examples = [_fill(config.few_shot_template, shot[0] + suffix, shot[1]) for shot in shots]
        text = "".join([*examples, question + suffix])
        token_ids = tuple(self._tokenizer.encode(text))
        return (*self._bos, *token_ids) if token_ids else (), text

    def _apply(self, messages: list[Message]) -> tuple[int, ...]:
        # Without a template of our own the tokenizer's is meant.
        more = {} if self._template is None else {"template": self._template}
        return tuple(self._tokenizer.apply_chat_template(messages, **more))

    def _check_template(self, messages: list[Message], token_ids: tuple[int, ...]) -> None:
        """Refuse a template that leaves a message out: nobody would see it in the figures.

        What the assistant says in examples may be cut: many templates drop earlier thoughts.
        """
        for place in reversed(range(len(messages))):
            message = messages[place]
            content = message["content"]
            if message["role"] == "assistant" or not content.strip():
                continue
            doubled = [*messages]
            doubled[place] = {**message, "content": f"{content}\n{content}"}
            if self._apply(doubled) != token_ids:
                continue
            what = "the examples of data.few_shot"
            if place == len(messages) - 1:
                what = "the question"
            elif message["role"] == "system":
                what = "data.system_prompt"
            raise UserError(
                f"the chat template leaves out {what}: another text there makes the same prompt; "
                "expected a template that writes every message's `content`"
            )


def encoded_rows(
    source: DataSource,
    config: DataConfig,
    tokenizer: Tokenizer,
    extract: Callable[[RowReader, Record], Extracted],
    counts: RowCounts,
    told: OnBroken | None = None,
) -> Iterator[EncodedRow[Extracted]]:
    """The usable rows of a source, in order; `counts` is filled on the way.

    Rows that the configuration skips go to `told`, or else to the log.

    Raises:
        UserError: anything wrong with the source or, unless the configuration skips it, with a row
            (named by its place); a prompt that is too long where that is an error; and, at the end,
            if no row is left.
    """
    skipped = BrokenRows(told)
    on_broken: OnBroken = skipped if config.broken_rows == "skip" else refuse
    reader, encoder = RowReader(source, config), PromptEncoder(config, tokenizer)
    dropped_lengths: list[int] = []
    num_left = 0
    for record in read_rows(source, config.limit, on_broken):
        try:
            row = _encode(record, reader, encoder, extract)
        except BrokenRow as error:
            on_broken(error)
            continue
        length = len(row.token_ids)
        if length > config.max_prompt_length:
            if config.overlong_prompts == "error":
                raise _too_long(row, config.max_prompt_length)
            if config.overlong_prompts == "drop":
                dropped_lengths.append(length)
                continue
            counts.truncated += 1
            row = _truncated(row, config.max_prompt_length, tokenizer)
        num_left += 1
        yield row
    counts.dropped, counts.broken = len(dropped_lengths), skipped.count
    if num_left == 0:
        raise _nothing_left(source, dropped_lengths, skipped, config.max_prompt_length)


def _encode(
    record: Record,
    reader: RowReader,
    encoder: PromptEncoder,
    extract: Callable[[RowReader, Record], Extracted],
) -> EncodedRow[Extracted]:
    question = reader.question(record)
    try:
        token_ids, text = encoder.encode(question)
    except UserError as error:
        # The template is at fault as often as the row.
        where = f" ({encoder.template_path})" if encoder.template_path else ""
        raise UserError(f"{record.source}: {error}{where}") from error
    if not token_ids:
        raise BrokenRow(
            f"{record.source}: the prompt is {question!r:.60} and has no tokens; expected text of "
            "at least one token"
        )
    return EncodedRow(record, question, token_ids, text, extract(reader, record))


def _truncated(
    row: EncodedRow[Extracted], length: int, tokenizer: Tokenizer
) -> EncodedRow[Extracted]:
    token_ids = row.token_ids[-length:]
    return EncodedRow(
        row.record, row.question, token_ids, tokenizer.decode(token_ids), row.extracted
    )


def _too_long(row: EncodedRow[Extracted], most: int) -> UserError:
    return UserError(
        f"{row.record.source}: the prompt has {len(row.token_ids)} tokens; expected at most "
        f"data.max_prompt_length = {most}; data.overlong_prompts: drop leaves it out, "
        "truncate_left cuts it"
    )


def _nothing_left(
    source: DataSource, dropped_lengths: list[int], skipped: BrokenRows, most: int
) -> UserError:
    if not dropped_lengths:
        return UserError(
            f"{source.place}: no usable row is left; the first broken one: {skipped.first}"
        )
    return UserError(
        f"{source.place}: all {len(dropped_lengths)} prompts are longer than "
        f"data.max_prompt_length = {most} tokens; the shortest has {min(dropped_lengths)}"
    )


def _messages(
    system_prompt: str | None, shots: list[tuple[str, str]], question: str, suffix: str
) -> list[Message]:
    messages: list[Message] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    for asked, answer in shots:
        messages.append({"role": "user", "content": asked + suffix})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": question + suffix}]


def _fill(template: str, question: str, answer: str) -> str:
    """The template with both put in; braces within them stay as they are."""
    values = {"{question}": question, "{answer}": answer}
    return re.sub(r"\{question\}|\{answer\}", lambda found: values[found.group(0)], template)


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read; expected a chat template: {error}") from error
    check_template(template, path)
    return template


def _read_shots(config: DataConfig) -> list[tuple[str, str]]:
    """Questions with worked answers: one more than are shown, for a question that is among them."""
    if config.few_shot is None or not config.num_few_shot:
        return []
    reader = RowReader(config.few_shot, config)
    wanted = config.num_few_shot + 1
    shots = [
        (reader.question(record), reader.demonstration(record))
        for record in read_rows(config.few_shot, wanted)
    ]
    if len(shots) < config.num_few_shot:
        raise UserError(
            f"{config.few_shot.place}: has {len(shots)} examples; expected at least "
            f"data.num_few_shot = {config.num_few_shot}"
        )
    return shots
