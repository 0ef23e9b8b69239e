"""Worked answers for the supervised warm-up, as tensors aligned with `labels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Int64
from torch import Tensor

from nested_reft_mcore.config.data import DataConfig, DataSource, train_sources
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.collation import lay_out
from nested_reft_mcore.data.encoding import RowCounts, encoded_rows
from nested_reft_mcore.data.records import Record
from nested_reft_mcore.data.rows import RowReader, as_source
from nested_reft_mcore.data.stream import Part
from nested_reft_mcore.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Demonstration:
    """A question and an answer to learn from."""

    prompt_ids: tuple[int, ...]
    """What the policy reads, chat template included."""
    response_ids: tuple[int, ...]
    """What it should write, end of sequence included."""
    source: str = ""
    """Where it came from, as `file:line`."""


@dataclass(frozen=True)
class DemonstrationSet:
    """The demonstrations of one data set or of several, in their order."""

    demonstrations: tuple[Demonstration, ...]
    num_dropped: int = 0
    """Those left out because the prompt was longer than `max_prompt_length`."""
    parts: tuple[Part, ...] = ()
    """The data sets that it is made of."""
    num_truncated: int = 0
    """Those whose prompt lost its beginning for the same reason."""
    num_broken: int = 0
    """Rows left out because they could not be used."""

    def __len__(self) -> int:
        return len(self.demonstrations)

    def __getitem__(self, index: int) -> Demonstration:
        return self.demonstrations[index]

    def metrics(self) -> dict[str, float]:
        """What was read and left out, for the log of a run."""
        return {
            "data/num_prompts": float(len(self.demonstrations)),
            "data/num_dropped": float(self.num_dropped),
            "data/num_truncated": float(self.num_truncated),
            "data/num_broken": float(self.num_broken),
        }


@dataclass(frozen=True)
class DemonstrationBatch:
    """Demonstrations as rows; everything is aligned with `labels` (docs/architecture.md)."""

    tokens: Int64[Tensor, "batch seq"]
    """Prompt and response without the last token, right-padded."""
    labels: Int64[Tensor, "batch seq"]
    """Prompt and response without the first token, right-padded."""
    position_ids: Int64[Tensor, "batch seq"]
    """0, 1, 2, ... in every row."""
    loss_mask: Bool[Tensor, "batch seq"]
    """True where the label belongs to the response, end of sequence included."""


def load_demonstrations(
    source: DataSource | str | Path, config: DataConfig, tokenizer: Tokenizer
) -> DemonstrationSet:
    """Read questions with worked answers; the questions exactly as `load_prompts` makes them.

    Question and answer are tokenized apart, because the policy's own answers begin after the
    question's tokens too. UserError for anything wrong in the file, if no demonstration is left,
    and for a tokenizer without an end of sequence.
    """
    source = as_source(source)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"{source.place}: the tokenizer has no end-of-sequence token; expected one, because a "
            "demonstration without it never teaches the policy to stop"
        )

    def extract(reader: RowReader, record: Record) -> str:
        return reader.demonstration(record)

    counts = RowCounts()
    demonstrations = tuple(
        Demonstration(row.token_ids, (*tokenizer.encode(row.extracted), eos), row.record.source)
        for row in encoded_rows(source, config, tokenizer, extract, counts)
    )
    parts = (Part(source.label, len(demonstrations), source.weight),)
    return DemonstrationSet(demonstrations, counts.dropped, parts, counts.truncated, counts.broken)


def load_training_demonstrations(config: DataConfig, tokenizer: Tokenizer) -> DemonstrationSet:
    """All that `config` trains on, one data set after the other. UserError as for one of them."""
    sets = [load_demonstrations(source, config, tokenizer) for source in train_sources(config)]
    return DemonstrationSet(
        sum((one.demonstrations for one in sets), ()),
        sum(one.num_dropped for one in sets),
        sum((one.parts for one in sets), ()),
        sum(one.num_truncated for one in sets),
        sum(one.num_broken for one in sets),
    )


def collate(
    demonstrations: Sequence[Demonstration],
    pad_token_id: int,
    pad_to_multiple: int = 1,
    length: int | None = None,
) -> DemonstrationBatch:
    """Lay out demonstrations as rows, in order.

    `length` fixes `seq`; left out, it is the longest row rounded up to `pad_to_multiple`.
    ValueError for an empty batch, prompt or response, and for rows that don't fit.
    """
    if not demonstrations:
        raise ValueError("no demonstrations to make a batch of")
    if not all(item.prompt_ids and item.response_ids for item in demonstrations):
        raise ValueError("a demonstration has an empty prompt or response")
    pairs = [(item.prompt_ids, item.response_ids) for item in demonstrations]
    return DemonstrationBatch(*lay_out(pairs, pad_token_id, pad_to_multiple, length))
