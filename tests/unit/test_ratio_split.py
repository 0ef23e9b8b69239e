"""Engine, skip and staleness: each part from the right two policies, over the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from replica_cases import CONTEXT, on_replicas
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import Prompt, Rollout
from nested_reft_mcore.training.ratio_split import RatioSplit

PLAN = LayerSkipPlan.parse("1", 3)
ENGINE, SKIP, STALE = "nested/kl_engine", "nested/kl_skip", "nested/kl_stale"


class NestedPolicy:
    """What is skipped now, and nothing else."""

    def __init__(self) -> None:
        self.plan = LayerSkipPlan.full(3)

    @contextmanager
    def nested(self, plan: LayerSkipPlan) -> Iterator[None]:
        self.plan, before = plan, self.plan
        yield
        self.plan = before


def batch_of(*lengths: int) -> TrainingBatch:
    """Rows of so many sampled tokens, behind prompts of two."""
    rollouts = [
        Rollout(
            Prompt((1, 2), ""), row, 0, (3,) * n, tuple(-0.5 * i - row for i in range(n)), "stop"
        )
        for row, n in enumerate(lengths)
    ]
    return TrainingBatch.from_rollouts(rollouts, torch.zeros(len(lengths)), 0)


def split_of(batch: TrainingBatch) -> RatioSplit:
    """Engine 0.25 at every token; skip 1 in the first row, 2 in the second, ..."""
    nested = batch.behavior_logprobs - 0.25
    return RatioSplit(batch, nested, nested - 1 - torch.arange(len(batch))[:, None])


@pytest.mark.parametrize("has_old", [False, True])
def test_each_pass_is_of_the_right_policy(has_old: bool) -> None:
    policy, batch, passes = NestedPolicy(), batch_of(2, 3), []

    def logprobs(given: TrainingBatch) -> Tensor:
        passes.append(policy.plan)
        return torch.full(given.tokens.shape, -2.0 if policy.plan == PLAN else -1.0)

    if has_old:
        batch = batch.with_old_logprobs(torch.full(batch.tokens.shape, -3.0))
    split = RatioSplit.measure(logprobs, cast(Any, policy), batch, PLAN)
    assert bool((split.nested_logprobs == -2.0).all())
    # Old log-probs are those at full depth: there is no need to find them again.
    assert passes == ([PLAN] if has_old else [PLAN, LayerSkipPlan.full(3)])
    assert bool((split.full_logprobs == (-3.0 if has_old else -1.0)).all())


def test_parts_are_means_over_the_tokens_of_all_updates() -> None:
    split = split_of(batch_of(1, 3, 2, 4))
    even, odd = split.full_logprobs[::2] - 8.0, split.full_logprobs[1::2] + 4.0
    found = split.metrics([even, odd], CONTEXT)
    assert found[ENGINE] == pytest.approx(0.25)
    # Rows 0 and 2 are the first mini-batch, with 1 and 2 tokens; 1 and 3 the second, 3 and 4.
    assert found[SKIP] == pytest.approx((1 + 2 * 3 + 3 * 2 + 4 * 4) / 10)
    assert found[STALE] == pytest.approx((3 * 8.0 - 7 * 4.0) / 10)


def test_tokens_without_a_ratio_count_nowhere() -> None:
    batch = batch_of(2, 2)
    split = split_of(batch)
    target = split.full_logprobs - 1.0
    # Places outside of the mask hold anything; a token that is not finite takes its parts along.
    target[~batch.response_mask] = 7.0
    target[0, 1] = -torch.inf
    split.nested_logprobs[1, 2] = torch.nan
    found = split.metrics([target], CONTEXT)
    assert found == pytest.approx({ENGINE: 0.25, SKIP: 1.5, STALE: 1.0})
    nothing = batch.without_responses(torch.tensor([True, True]))
    assert split_of(nothing).metrics([target], CONTEXT) == {ENGINE: 0.0, SKIP: 0.0, STALE: 0.0}


def test_replicas_find_what_one_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (1, 3, 2, 4, 5, 1, 1, 1)
    whole = split_of(batch_of(*lengths))
    change = torch.arange(8.0)[:, None]

    def targets(split: RatioSplit, rows: slice) -> list[Tensor]:
        moved = split.full_logprobs - change[rows]
        return [moved[::2], moved[1::2]]

    def on_one(context: ParallelContext) -> dict[str, float]:
        rows = slice(4 * context.data.rank, 4 * context.data.rank + 4)
        part = whole.batch.split(2)[context.data.rank]
        split = RatioSplit(part, whole.nested_logprobs[rows], whole.full_logprobs[rows])
        return split.metrics(targets(split, rows), context)

    expected = whole.metrics(targets(whole, slice(8)), CONTEXT)
    for found in on_replicas(2, on_one, monkeypatch):
        assert found == pytest.approx(expected)
