"""What data sets hold, before a run depends on it: rows, fields, lengths, duplicates, overlap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.data import DataConfig, DataSource
from nested_reft_mcore.data.chat_template import Message
from nested_reft_mcore.data.overlap import Pair, find_duplicates, find_overlap
from nested_reft_mcore.data.prompts import PromptSet, load_prompts
from nested_reft_mcore.data.records import BrokenRow
from nested_reft_mcore.data.sources import read_rows
from nested_reft_mcore.data.tokenizers import Tokenizer

_SHOWN = 5
"""Broken rows of a set, and pairs of prompts, in the text."""
_SHOWN_CHARACTERS = 72


class CharacterCounter:
    """Stands in for a tokenizer that is not given: lengths are counted in characters."""

    vocab_size = 0x110000
    eos_token_id = None
    eos_token_ids: frozenset[int] = frozenset()
    bos_token_id = None
    pad_token_id = 0

    def encode(self, text: str) -> list[int]:
        """Code points."""
        return [ord(letter) for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of code points."""
        return "".join(chr(token) for token in ids)

    def token_to_id(self, token: str) -> int | None:
        """The code point of a single character."""
        return ord(token) if len(token) == 1 else None

    def apply_chat_template(
        self, messages: Sequence[Message], template: str | None = None
    ) -> list[int]:
        """Contents alone: there is no template without a tokenizer."""
        return self.encode("\n".join(message["content"] for message in messages))

    def save(self, directory: str | Path) -> None:
        """There is nothing to save. Always an error."""
        raise NotImplementedError(f"{directory}: characters are no tokenizer")


@dataclass(frozen=True)
class BrokenPlace:
    """A row that cannot be used."""

    file: str
    line: int | None
    """From 1: of the line in JSON lines and CSV, of the row in other formats."""
    reason: str


@dataclass(frozen=True)
class SourceReport:
    """What one data set holds."""

    name: str
    place: str
    fields: tuple[str, ...]
    """Keys of its first row."""
    num_prompts: int
    broken: tuple[BrokenPlace, ...]
    """Rows that cannot be used, all of them."""
    num_dropped: int | None
    """Prompts that are too long; None where nobody can tell, for lack of a tokenizer."""
    num_truncated: int | None
    num_without_answer: int
    num_duplicates: int
    lengths: tuple[int, int, int, int]
    """Least, median, 95th percentile and most of what is left."""
    unit: str
    """Of the lengths: tokens or characters."""
    labels: dict[str, int]
    """Label to how many values it takes."""
    example: tuple[str, str]
    """Question and answer of its first prompt."""


@dataclass(frozen=True)
class DataReport:
    """What the data of a run holds."""

    train: tuple[SourceReport, ...]
    eval: tuple[SourceReport, ...]
    duplicates: tuple[tuple[str, str], ...]
    """Places of training prompts whose question stands before, also in another data set."""
    overlap: tuple[tuple[str, str], ...]
    """Places of training prompts that are evaluated on, and of the evaluation prompts."""
    refusals: tuple[str, ...]
    """Why `train` would refuse these data under this configuration; empty where it would not."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is broken, double or both trained and evaluated on."""
        broken = sum(
            len(report.broken) + report.num_without_answer for report in (*self.train, *self.eval)
        )
        return not (broken or self.duplicates or self.overlap)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        lines: list[str] = []
        for use, reports in (("train", self.train), ("eval", self.eval)):
            for report in reports:
                lines += _describe(use, report)
        lines += _describe_pairs("training prompts stand there before", self.duplicates)
        if self.train and self.eval:
            lines += _describe_pairs("training prompts are also evaluated on", self.overlap)
        lines += [f"train would refuse: {reason}" for reason in self.refusals]
        return "\n".join(lines)


def check_data_sets(
    train: Sequence[DataSource],
    held_out: Sequence[DataSource],
    config: DataConfig,
    tokenizer: Tokenizer | None,
) -> DataReport:
    """Read all of them as a run would; broken and overlong rows are listed or counted, whatever the
    configuration says, and what a run would say to them is told.

    Without a tokenizer lengths are in characters, and whether a prompt is too long is not checked.

    Raises:
        UserError: a data set cannot be read, or holds no usable row.
    """
    changes: dict[str, Any] = {"broken_rows": "skip"}
    if config.overlong_prompts == "error":
        changes |= {"overlong_prompts": "drop"}
    if tokenizer is None:
        changes |= {"template": "none", "add_bos": False, "max_prompt_length": 1 << 62}
    given, config = config, config.model_copy(update=changes)
    counting = CharacterCounter() if tokenizer is None else tokenizer
    unit = "characters" if tokenizer is None else "tokens"
    broken: dict[str, list[BrokenRow]] = {}

    def load(use: str, source: DataSource) -> PromptSet:
        return load_prompts(
            source, config, counting, broken.setdefault(f"{use} {source.label}", []).append
        )

    uses = (("train", train), ("eval", held_out))
    sets = [[load(use, source) for source in group] for use, group in uses]
    trained, evaluated = ([p for one in group for p in one.prompts] for group in sets)
    reports = [
        tuple(
            _report(s, one, unit, broken[f"{use} {s.label}"])
            for s, one in zip(group, loaded, strict=True)
        )
        for (use, group), loaded in zip(uses, sets, strict=True)
    ]
    return DataReport(
        reports[0],
        reports[1],
        _places(find_duplicates(trained)),
        _places(find_overlap(trained, evaluated)),
        tuple(_refusals([*reports[0], *reports[1]], given)),
    )


def _refusals(reports: Sequence[SourceReport], config: DataConfig) -> list[str]:
    reasons = []
    for report in reports:
        if report.broken and config.broken_rows == "error":
            reasons.append(
                f"{report.place}: {len(report.broken)} broken rows, and data.broken_rows is error"
            )
        if report.num_dropped and config.overlong_prompts == "error":
            reasons.append(
                f"{report.place}: {report.num_dropped} prompts longer than data.max_prompt_length "
                f"= {config.max_prompt_length}, and data.overlong_prompts is error"
            )
    return reasons


def _broken_place(source: DataSource, error: BrokenRow) -> BrokenPlace:
    """The parts of an error that begins `file:12: ` or `file:row 12: `."""
    text = str(error)
    found = re.match(r":(?:row )?(\d+): (.*)", text.removeprefix(source.place), re.DOTALL)
    if not text.startswith(source.place) or found is None:
        return BrokenPlace(source.place, None, text)
    return BrokenPlace(source.place, int(found[1]), found[2])


def _report(
    source: DataSource, prompts: PromptSet, unit: str, broken: Sequence[BrokenRow]
) -> SourceReport:
    is_measured = unit == "tokens"
    lengths = sorted(len(prompt.token_ids) for prompt in prompts.prompts)
    values: dict[str, set[str]] = {}
    for prompt in prompts.prompts:
        for name, value in prompt.labels:
            values.setdefault(name, set()).add(value)
    first = next(iter(read_rows(source, 1, lambda _: None)))
    last = len(lengths) - 1
    return SourceReport(
        name=source.label,
        place=source.place,
        fields=tuple(first.fields),
        num_prompts=len(prompts),
        broken=tuple(_broken_place(source, error) for error in broken),
        num_dropped=prompts.num_dropped if is_measured else None,
        num_truncated=prompts.num_truncated if is_measured else None,
        num_without_answer=prompts.num_without_answer,
        num_duplicates=len(find_duplicates(prompts.prompts)),
        lengths=(lengths[0], lengths[last // 2], lengths[last * 95 // 100], lengths[last]),
        unit=unit,
        labels={name: len(found) for name, found in values.items()},
        example=(prompts[0].question, prompts[0].answer or ""),
    )


def _places(pairs: Sequence[Pair]) -> tuple[tuple[str, str], ...]:
    return tuple((one.source, other.source) for one, other in pairs)


def _describe(use: str, report: SourceReport) -> list[str]:
    least, median, high, most = report.lengths
    question, answer = (_cut(text) for text in report.example)
    labels = ", ".join(f"{name} ({count} values)" for name, count in report.labels.items())
    too_long = f"{report.num_dropped} dropped, {report.num_truncated} truncated"
    if report.num_dropped is None:
        too_long = "longest length not checked: no tokenizer"
    return [
        f"{use} {report.name}: {report.place}",
        f"  {report.num_prompts} prompts; {len(report.broken)} broken rows, {too_long}, "
        f"{report.num_without_answer} without answer, {report.num_duplicates} duplicates",
        *_describe_broken(report.broken),
        f"  {report.unit}: least {least}, median {median}, 95% {high}, most {most}",
        f"  fields: {', '.join(report.fields)}" + (f"; labels: {labels}" if labels else ""),
        f"  first: {question} -> {answer}",
    ]


def _describe_broken(broken: Sequence[BrokenPlace]) -> list[str]:
    lines = [f"  broken: {one.file}:{one.line or '?'}: {one.reason}" for one in broken[:_SHOWN]]
    if len(broken) > _SHOWN:
        lines.append(f"  and {len(broken) - _SHOWN} more broken rows; --json has all of them")
    return lines


def _describe_pairs(what: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"{len(pairs)} {what}" + (":" if pairs else "")]
    lines += [f"  {one} = {other}" for one, other in pairs[:_SHOWN]]
    if len(pairs) > _SHOWN:
        lines.append(f"  and {len(pairs) - _SHOWN} more; --json has all of them")
    return lines


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 3] + "..."
