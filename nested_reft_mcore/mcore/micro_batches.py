"""The micro-batches of a pass: of one shape, or filled up to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import from_last_stage
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.packing import (
    deal_rows,
    fill_micro_batches,
    num_micro_batches,
    round_up,
)


@dataclass(frozen=True)
class MicroBatches:
    """What one replica runs, and where its rows come from."""

    batches: tuple[TrainingBatch, ...]
    """As many as the schedule asks for; masked throughout where there was nothing left."""
    rows: tuple[tuple[int, ...], ...]
    """Of each micro-batch: the place of its first rows in `shape`; those behind are masked."""
    shape: tuple[int, int]
    """Rows and places of the batch that they were taken from."""
    own_rows: slice
    """This replica's rows in that batch: others where rows changed replicas."""
    own_width: int
    """Places of this replica's own batch."""
    has_variable_lengths: bool

    @property
    def num_places(self) -> int:
        """Tokens that pass through the model, padding included."""
        return sum(batch.tokens.numel() for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Those up to the last that counts in their row."""
        pairs = zip(self.batches, self.rows, strict=True)
        return sum(sum(batch.lengths()[: len(rows)]) for batch, rows in pairs)

    def gather(
        self, columns: Sequence[Sequence[Tensor]], context: ParallelContext
    ) -> tuple[Tensor, ...]:
        """Results of micro-batches as columns of this replica's batch, in its order.

        Args:
            columns: Of the last pipeline stage, for each result one `[rows, places]` tensor per
                micro-batch; ignored on other stages.
            context: All processes call this.

        Returns:
            For each result `[batch, seq]` float32 on the CPU; 0 where nothing was computed.
        """
        whole = torch.zeros((len(columns), *self.shape), dtype=torch.float32, device=context.device)
        if context.is_last_stage:
            for column, results in zip(whole, columns, strict=True):
                for rows, result in zip(self.rows, results, strict=True):
                    places = torch.tensor(rows, dtype=torch.int64, device=context.device)
                    column[places, : result.shape[1]] = result[: len(rows)].float()
        is_exchanged = self.own_rows != slice(0, self.shape[0])
        if is_exchanged and context.is_last_stage:
            # Every row was one replica's: all others add nothing to it.
            dist.all_reduce(whole, group=context.data.group)
        return tuple(from_last_stage(whole, context)[:, self.own_rows, : self.own_width].cpu())


def equal_micro_batches(
    batch: TrainingBatch, micro_batch_size: int, context: ParallelContext
) -> MicroBatches:
    """Micro-batches of `micro_batch_size` rows in order, all as long as the longest row."""
    batches = list(batch.micro_batches(micro_batch_size))
    starts = range(0, len(batch), micro_batch_size)
    rows = [tuple(range(start, min(start + micro_batch_size, len(batch)))) for start in starts]
    missing = -len(batches) % _unit(context)
    batches += [_masked(batches[0])] * missing
    return MicroBatches(
        tuple(batches),
        tuple(rows) + ((),) * missing,
        (len(batch), batch.tokens.shape[1]),
        slice(0, len(batch)),
        batch.tokens.shape[1],
        has_variable_lengths=False,
    )


def filled_micro_batches(
    batch: TrainingBatch, max_tokens: int, multiple: int, context: ParallelContext
) -> MicroBatches:
    """Micro-batches of at most `max_tokens` places, rows of like lengths together.

    Replicas exchange rows, so that all have about equally many tokens, and run equally many
    micro-batches. Every process calls this.

    Args:
        batch: This replica's rows.
        max_tokens: Rows times the longest of them, in a micro-batch.
        multiple: Of the length of a micro-batch: sequence parallelism cuts it into equal parts.
        context: Replicas and stages.

    Raises:
        UserError: the longest sequence of any replica does not fit.
    """
    shares = _all_replicas(batch, context)
    whole = TrainingBatch.concatenate(shares)
    starts = [sum(len(share) for share in shares[:i]) for i in range(len(shares) + 1)]
    lengths = whole.lengths()
    dealt = deal_rows(lengths, context.data.size)
    needed = max(
        num_micro_batches([lengths[row] for row in rows], max_tokens, multiple) for rows in dealt
    )
    # All replicas run as many: with fewer one would only wait for the others' gradients.
    needed += -needed % _unit(context)
    mine = dealt[context.data.rank]
    filled = fill_micro_batches([lengths[row] for row in mine], max_tokens, needed, multiple)
    rows = tuple(tuple(mine[place] for place in places) for places in filled)
    return MicroBatches(
        tuple(_filled(whole, chosen, lengths, multiple) for chosen in rows),
        rows,
        (len(whole), whole.tokens.shape[1]),
        slice(starts[context.data.rank], starts[context.data.rank + 1]),
        batch.tokens.shape[1],
        has_variable_lengths=True,
    )


def _filled(
    whole: TrainingBatch, rows: Sequence[int], lengths: Sequence[int], multiple: int
) -> TrainingBatch:
    if not rows:
        return _masked(whole.take([0], multiple))
    longest = max(lengths[row] for row in rows)
    return whole.take(rows, round_up(longest, multiple))


def _masked(batch: TrainingBatch) -> TrainingBatch:
    """The same rows, counting for nothing."""
    return replace(batch, response_mask=torch.zeros_like(batch.response_mask))


def _unit(context: ParallelContext) -> int:
    """The interleaved schedule wants a multiple of the number of stages."""
    return context.pipeline.size if context.num_chunks > 1 else 1


def _all_replicas(batch: TrainingBatch, context: ParallelContext) -> list[TrainingBatch]:
    """The batches of all replicas, in order; on the CPU."""
    if context.data.group is None:
        return [batch]
    gathered: list[Any] = [None] * context.data.size
    dist.all_gather_object(gathered, batch.to("cpu"), group=context.data.group)
    return gathered
