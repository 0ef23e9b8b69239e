"""Rows that change replicas: each once, equally many micro-batches, results back in their place."""

from __future__ import annotations

import pytest
import torch
from replica_cases import CONTEXT, on_replicas

from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.micro_batches import (
    MicroBatches,
    equal_micro_batches,
    filled_micro_batches,
)
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import Prompt, Rollout


def batch_of(*lengths: int) -> TrainingBatch:
    """Rows that take so many places, told apart by their advantage."""
    rollouts = [Rollout(Prompt((1,), ""), n, 0, (n,) * n, (-1.0,) * n, "stop") for n in lengths]
    return TrainingBatch.from_rollouts(rollouts, torch.tensor(lengths).float(), 0)


# The first replica has the long rows, and wider tensors. Dealt evenly and filled up to 32 places
# they take two micro-batches on two replicas and three on the other.
SHARES = ((30, 7, 29, 20), (3, 2, 5, 4), (1, 17, 6, 9))


def own_results(made: MicroBatches, context: ParallelContext) -> torch.Tensor:
    """What a pass that gives labels back makes of this replica's rows."""
    return made.gather([[batch.labels for batch in made.batches]], context)[0]


def test_rows_change_replicas_and_results_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_one(context: ParallelContext) -> tuple[MicroBatches, torch.Tensor]:
        made = filled_micro_batches(batch_of(*SHARES[context.data.rank]), 32, 2, context)
        return made, own_results(made, context)

    found = on_replicas(3, on_one, monkeypatch)
    # The schedule's collectives would wait for a micro-batch that one of them lacks.
    assert len({len(made.batches) for made, _ in found}) == 1
    learned = [
        advantage
        for made, _ in found
        for batch, rows in zip(made.batches, made.rows, strict=True)
        for advantage in batch.advantages[: len(rows)].tolist()
    ]
    assert sorted(learned) == sorted(length for share in SHARES for length in share)
    for (made, results), share in zip(found, SHARES, strict=True):
        assert torch.equal(results, batch_of(*share).labels.float())
        assert all(batch.tokens.numel() <= 32 for batch in made.batches)
        assert all(batch.tokens.shape[1] % 2 == 0 for batch in made.batches)
        # A long row each, though one replica had them all.
        assert sum(batch.num_response_tokens for batch in made.batches) < 50


@pytest.mark.parametrize("size", [1, 3, 4])
def test_rows_of_one_shape_stay_in_order(size: int) -> None:
    batch = batch_of(*SHARES[0])
    made = equal_micro_batches(batch, size, CONTEXT)
    assert torch.equal(own_results(made, CONTEXT), batch.labels.float())
    assert made.num_tokens == sum(SHARES[0])
