"""What data sets hold, before a run depends on it: rows, fields, lengths, duplicates, overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.data import DataConfig, DataSource
from nested_reft_mcore.data.chat_template import Message
from nested_reft_mcore.data.overlap import Pair, find_duplicates, find_overlap
from nested_reft_mcore.data.prompts import PromptSet, load_prompts
from nested_reft_mcore.data.sources import read_rows
from nested_reft_mcore.data.tokenizers import Tokenizer

_SHOWN_PAIRS = 5
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
class SourceReport:
    """What one data set holds."""

    name: str
    place: str
    fields: tuple[str, ...]
    """Keys of its first row."""
    num_prompts: int
    num_broken: int
    num_dropped: int
    num_truncated: int
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

    @property
    def is_clean(self) -> bool:
        """Whether nothing is broken, double or both trained and evaluated on."""
        broken = sum(
            report.num_broken + report.num_without_answer for report in (*self.train, *self.eval)
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
        return "\n".join(lines)


def check_data_sets(
    train: Sequence[DataSource],
    held_out: Sequence[DataSource],
    config: DataConfig,
    tokenizer: Tokenizer | None,
) -> DataReport:
    """Read all of them as a run would; broken rows are counted, whatever the configuration says.

    Without a tokenizer lengths are in characters, and no prompt is too long.

    Raises:
        UserError: a data set cannot be read, or holds no usable row.
    """
    changes: dict[str, Any] = {"broken_rows": "skip"}
    if tokenizer is None:
        changes |= {"template": "none", "add_bos": False, "max_prompt_length": 1 << 62}
    config = config.model_copy(update=changes)
    counting = CharacterCounter() if tokenizer is None else tokenizer
    unit = "characters" if tokenizer is None else "tokens"
    sets = [[load_prompts(s, config, counting) for s in group] for group in (train, held_out)]
    trained, evaluated = ([p for one in group for p in one.prompts] for group in sets)
    reports = [
        tuple(_report(s, one, unit) for s, one in zip(group, loaded, strict=True))
        for group, loaded in zip((train, held_out), sets, strict=True)
    ]
    return DataReport(
        reports[0],
        reports[1],
        _places(find_duplicates(trained)),
        _places(find_overlap(trained, evaluated)),
    )


def _report(source: DataSource, prompts: PromptSet, unit: str) -> SourceReport:
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
        num_broken=prompts.num_broken,
        num_dropped=prompts.num_dropped,
        num_truncated=prompts.num_truncated,
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
    return [
        f"{use} {report.name}: {report.place}",
        f"  {report.num_prompts} prompts; {report.num_broken} broken rows, {report.num_dropped} "
        f"dropped, {report.num_truncated} truncated, {report.num_without_answer} without answer, "
        f"{report.num_duplicates} duplicates",
        f"  {report.unit}: least {least}, median {median}, 95% {high}, most {most}",
        f"  fields: {', '.join(report.fields)}" + (f"; labels: {labels}" if labels else ""),
        f"  first: {question} -> {answer}",
    ]


def _describe_pairs(what: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"{len(pairs)} {what}" + (":" if pairs else "")]
    lines += [f"  {one} = {other}" for one, other in pairs[:_SHOWN_PAIRS]]
    if len(pairs) > _SHOWN_PAIRS:
        lines.append(f"  and {len(pairs) - _SHOWN_PAIRS} more; --json has all of them")
    return lines


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 3] + "..."
