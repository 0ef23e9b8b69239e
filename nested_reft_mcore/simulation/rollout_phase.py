"""The generation of one step: lengths become rounds, rounds become passes with their seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.planning.decode_time import DecodeModel, PassLoad
from nested_reft_mcore.planning.layer_costs import parts_run
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.slots import Rounds
from nested_reft_mcore.simulation.decode_timing import Passes


@dataclass(frozen=True)
class StackedRounds:
    """Rounds of all replicas side by side; those with fewer stretches have empty ones behind."""

    count: NDArray[np.int64]
    """`[replicas, stretches]`."""
    rows: NDArray[np.float64]
    """`[replicas, stretches, lanes]`, as the others."""
    keys: NDArray[np.float64]
    piece_tokens: NDArray[np.float64]
    piece_pairs: NDArray[np.float64]

    @property
    def num_rounds(self) -> NDArray[np.int64]:
        """Of each replica."""
        return self.count.sum(axis=1)

    @property
    def mean_rows(self) -> float:
        """Sequences of a replica that decode in a round, on average."""
        rows = (self.count[..., None] * self.rows).sum()
        return float(rows / max(1, self.count.sum()))


def stack(rounds: Sequence[Rounds]) -> StackedRounds:
    """One array for each number."""
    longest = max(len(one.count) for one in rounds)

    def padded(name: str) -> NDArray[np.float64]:
        arrays = [np.asarray(getattr(one, name), dtype=np.float64) for one in rounds]
        widths = [(0, longest - len(array)) for array in arrays]
        return np.stack(
            [
                np.pad(array, [width] + [(0, 0)] * (array.ndim - 1))
                for array, width in zip(arrays, widths, strict=True)
            ]
        )

    return StackedRounds(
        padded("count").astype(np.int64),
        padded("rows"),
        padded("keys"),
        padded("piece_tokens"),
        padded("piece_pairs"),
    )


def time_of_passes(
    rounds: StackedRounds,
    plan: LayerSkipPlan,
    layout: Layout,
    model: DecodeModel,
    factors: NDArray[np.float64],
) -> Passes:
    """Seconds of every pass under a plan; `factors` are `[replicas, stages]`."""
    load = PassLoad(rounds.rows, rounds.keys, rounds.piece_tokens, rounds.piece_pairs)
    active = load.tokens > 0
    chunks, stages = layout.num_chunks, layout.pipeline
    size = layout.architecture.num_layers // (stages * chunks)
    seconds = np.zeros((*load.tokens.shape[:2], stages, chunks, load.tokens.shape[2]))
    known: dict[tuple[int, int], NDArray[np.float64]] = {}
    for stage in range(stages):
        for chunk in range(chunks):
            first = (chunk * stages + stage) * size
            parts = parts_run(plan, list(range(first, first + size)))
            if parts not in known:
                known[parts] = model.parts_seconds(*parts, load)
            taken = known[parts]
            if chunk == 0:
                taken = taken + model.fixed_seconds(load)
            if layout.is_last(stage) and chunk == chunks - 1:
                # Where all rows wait for their prompt there is nothing to sample.
                head = model.rows_head_seconds(load.rows)
                taken = taken + np.where(load.rows > 0, head, 0.0)
            slowed = taken * factors[:, stage, None, None]
            seconds[:, :, stage, chunk] = np.where(active, slowed, 0.0)
    messages = np.zeros(load.tokens.shape)
    if stages > 1:
        messages = np.where(active, model.message_seconds(load.tokens), 0.0)
    return Passes(rounds.count, seconds, messages, active)
