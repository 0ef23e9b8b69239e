"""The micro-batches of one step and what each takes on every stage.

Rows are dealt and packed by the very functions that the update itself uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.step_time import StepModel
from nested_reft_mcore.rollout.packing import (
    deal_rows,
    fill_micro_batches,
    num_micro_batches,
    round_up,
)


@dataclass(frozen=True)
class MicroBatchShapes:
    """Micro-batches of all replicas."""

    tokens: NDArray[np.float64]
    """Rows times the longest of them, `[micro_batches, replicas]`; 0: nothing was left."""
    longest: NDArray[np.float64]
    """Tokens of its longest row, of the same shape."""
    padding: float
    """Share of these tokens that is padding."""


def pack(lengths: Sequence[NDArray[np.int64]], config: Config, layout: Layout) -> MicroBatchShapes:
    """Micro-batches for the rows of a pass, whose `lengths` are given for each replica."""
    multiple = layout.tensor if layout.sequence_parallel else 1
    unit = layout.pipeline if layout.num_chunks > 1 else 1
    most = config.train.max_tokens_per_micro_batch
    if most is None:
        return _equal(lengths, config.train.micro_batch_size, multiple, unit)
    whole = np.concatenate(lengths).tolist()
    dealt = [[whole[row] for row in rows] for rows in deal_rows(whole, layout.data)]
    needed = max(num_micro_batches(rows, most, multiple) for rows in dealt)
    needed += -needed % unit
    filled = []
    for rows in dealt:
        batches = fill_micro_batches(rows, most, needed, multiple)
        filled.append(
            [(len(b), round_up(max((rows[i] for i in b), default=0), multiple)) for b in batches]
        )
    return _shapes(filled, sum(whole))


def _equal(
    lengths: Sequence[NDArray[np.int64]], size: int, multiple: int, unit: int
) -> MicroBatchShapes:
    """Rows in order, all as long as the replica's longest."""
    filled = []
    for rows in lengths:
        count = -(-len(rows) // size)
        # What is missing to a full micro-batch is filled up with masked rows.
        filled.append([(size, round_up(int(rows.max()), multiple))] * (count + -count % unit))
    return _shapes(filled, int(sum(rows.sum() for rows in lengths)))


def _shapes(filled: Sequence[Sequence[tuple[int, int]]], num_tokens: int) -> MicroBatchShapes:
    table = np.asarray(filled, dtype=np.float64).transpose(1, 2, 0)
    tokens = table[:, 0] * table[:, 1]
    return MicroBatchShapes(tokens, table[:, 1], 1 - num_tokens / max(1.0, float(tokens.sum())))


def pass_times(
    shapes: MicroBatchShapes,
    model: StepModel,
    layout: Layout,
    factors: NDArray[np.float64],
    *,
    backward: bool,
) -> NDArray[np.float64]:
    """Seconds of every pass in one direction, `[stages, chunks, micro_batches, replicas]`."""
    stages, chunks = layout.pipeline, layout.num_chunks
    size = layout.architecture.num_layers // (stages * chunks)
    times = np.zeros((stages, chunks, *shapes.tokens.shape))
    for has_head in (False, True):
        # A causal token looks at half of its sequence on average.
        seconds = model.pass_seconds(
            shapes.tokens, shapes.longest / 2, size, has_head=has_head, backward=backward
        )
        if has_head:
            times[-1, -1] = seconds
        else:
            times[:] = seconds
    return times * factors.T[:, None, None, :]
