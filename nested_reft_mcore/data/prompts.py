"""Questions to train and evaluate on: data sets become prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nested_reft_mcore.config.data import DataConfig, DataSource, eval_sources, train_sources
from nested_reft_mcore.data.encoding import RowCounts, encoded_rows
from nested_reft_mcore.data.prompt import Prompt
from nested_reft_mcore.data.records import OnBroken, Record
from nested_reft_mcore.data.rows import RowReader, as_source
from nested_reft_mcore.data.stream import Part
from nested_reft_mcore.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one data set or of several, in their order."""

    prompts: tuple[Prompt, ...]
    num_dropped: int = 0
    """Prompts left out because they were longer than `max_prompt_length`."""
    num_truncated: int = 0
    """Prompts that lost their beginning for the same reason."""
    num_broken: int = 0
    """Rows left out because they could not be used."""
    parts: tuple[Part, ...] = ()
    """The data sets that it is made of."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    @property
    def num_without_answer(self) -> int:
        """Prompts whose answer is empty: no completion of theirs can be right."""
        return sum(not prompt.answer for prompt in self.prompts)

    def metrics(self) -> dict[str, float]:
        """What was read and left out, for the log of a run."""
        return {
            "data/num_prompts": float(len(self.prompts)),
            "data/num_dropped": float(self.num_dropped),
            "data/num_truncated": float(self.num_truncated),
            "data/num_broken": float(self.num_broken),
            "data/num_without_answer": float(self.num_without_answer),
        }

    def fingerprint(self) -> str:
        """Of every prompt's tokens and answer, in order: whether two runs read the same data."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr((prompt.token_ids, prompt.answer)).encode())
        return digest.hexdigest()[:16]


def load_prompts(
    source: DataSource | str | Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    told: OnBroken | None = None,
) -> PromptSet:
    """Read questions with their answers, through the template that `config` names.

    A path alone is a file with the fields that `config` names. `told` hears of rows that
    `broken_rows: skip` leaves out, in place of the log.

    Raises:
        UserError: anything wrong in the file, with its place, and if no prompt is left. With
            `broken_rows: skip`, rows that cannot be used are counted instead.
    """
    source = as_source(source)

    def extract(reader: RowReader, record: Record) -> tuple[str, tuple[tuple[str, str], ...]]:
        return reader.answer(record), reader.labels(record)

    counts = RowCounts()
    prompts = tuple(
        Prompt(
            row.token_ids,
            row.text,
            row.extracted[0],
            row.record.source,
            dataset=source.label,
            labels=row.extracted[1],
            question=row.question,
        )
        for row in encoded_rows(source, config, tokenizer, extract, counts, told)
    )
    part = Part(source.label, len(prompts), source.weight)
    return PromptSet(prompts, counts.dropped, counts.truncated, counts.broken, (part,))


def load_training_prompts(config: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    """All that `config` trains on, one data set after the other. UserError as `load_prompts`."""
    return join([load_prompts(source, config, tokenizer) for source in train_sources(config)])


def load_evaluation_prompts(config: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    """All that `config` holds out, one data set after the other. UserError as `load_prompts`."""
    return join([load_prompts(source, config, tokenizer) for source in eval_sources(config)])


def join(sets: Sequence[PromptSet]) -> PromptSet:
    """One prompt set of several, each keeping its place and name."""
    return PromptSet(
        sum((one.prompts for one in sets), ()),
        sum(one.num_dropped for one in sets),
        sum(one.num_truncated for one in sets),
        sum(one.num_broken for one in sets),
        sum((one.parts for one in sets), ()),
    )
