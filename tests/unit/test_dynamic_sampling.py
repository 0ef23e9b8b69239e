"""Which groups a step learns from where those with equal rewards are replaced."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replica_cases import CONTEXT, on_replicas
from test_config_checks import config, refusal

from nested_reft_mcore.algorithm.advantages import (
    AdvantageMethod,
    equal_groups,
    group_relative_advantages,
)
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutBatch, RolloutStats
from nested_reft_mcore.training.advantages import replica_advantages
from nested_reft_mcore.training.dynamic_sampling import choose_groups, sample_dynamically
from nested_reft_mcore.training.experience import Experience

GROUP_SIZE = 2
NUM_GROUPS = 3


class Generator:
    """Groups that are named by their prompt, with or without a difference in rewards."""

    def __init__(self, teaches: str, context: ParallelContext = CONTEXT) -> None:
        """`teaches` has a + for every group that does, in order, over all refills and replicas."""
        self.teaches = teaches
        self.share = shard_range(NUM_GROUPS, context.data.rank, context.data.size)
        self.calls = 0

    def __call__(self, refill: int) -> tuple[RolloutBatch, torch.Tensor]:
        assert refill == self.calls
        self.calls += 1
        places = [refill * NUM_GROUPS + place for place in self.share]
        rollouts = tuple(
            Rollout(Prompt((place,), str(place)), place, sample, (7, 8), (-1.0, -1.0), "stop")
            for place in places
            for sample in range(GROUP_SIZE)
        )
        rewards = [
            float(sample) if self.teaches[place] == "+" else float(place % 2)
            for place in places
            for sample in range(GROUP_SIZE)
        ]
        stats = RolloutStats(12, 2.0, (5, 5), (5, 4), (0, 1), 6, (10, 20), (0.5, 0.25 * refill))
        batch = RolloutBatch(rollouts, GROUP_SIZE, LayerSkipPlan.parse("1.mlp", 2), stats)
        return batch, torch.tensor(rewards)


@pytest.mark.parametrize(
    ("teaches", "chosen", "refills", "filled"),
    [
        # Enough at once.
        ("+++", "012", 0, 0),
        # The first that teach, in order; one more generation is enough.
        ("-+-+++", "134", 1, 0),
        ("------+++", "678", 2, 0),
        # Too few after two refills: the first of the others, behind them.
        ("-+------+", "180", 2, 1),
        ("---------", "012", 2, 3),
    ],
)
def test_groups_are_taken_in_order(teaches: str, chosen: str, refills: int, filled: int) -> None:
    generate = Generator(teaches)
    batch, rewards, metrics = sample_dynamically(generate, NUM_GROUPS, 2, CONTEXT)
    assert [group[0].prompt.text for group in batch.groups()] == list(chosen)
    # Numbered anew, as a dump and its replay want it.
    assert [group[0].prompt_index for group in batch.groups()] == [0, 1, 2]
    expected = [
        float(s) if teaches[int(p)] == "+" else float(int(p) % 2) for p in chosen for s in (0, 1)
    ]
    assert rewards.tolist() == expected
    seen = teaches[: (refills + 1) * NUM_GROUPS]
    assert metrics["rollout/num_refills"] == refills == generate.calls - 1
    assert metrics["rollout/num_filtered_groups"] == seen.count("-")
    assert metrics["rollout/num_filled_groups"] == filled
    mean = sum(0.5 if one == "+" else place % 2 for place, one in enumerate(seen)) / len(seen)
    assert metrics["rollout/rewards_before_filtering/mean"] == pytest.approx(mean)
    # Those that fill up are the ones that a reader of the rewards masks.
    assert int(equal_groups(rewards, GROUP_SIZE).sum()) == filled * GROUP_SIZE
    generations = refills + 1
    assert batch.plan == LayerSkipPlan.parse("1.mlp", 2)
    assert batch.stats.generated_tokens == 12 * generations
    assert batch.stats.seconds == 2.0 * generations
    assert batch.stats.layer_executions == (5.0 * generations, 4.5 * generations)
    assert batch.stats.kv_cache_bytes == (10, 20)
    assert batch.stats.waiting_shares == (0.5, pytest.approx(0.125 * refills))


# Of three replicas each has a group a time: some have none of the chosen, or all of them.
@pytest.mark.parametrize("teaches", ["+++", "-+-+++", "+--+--+--", "-+------+", "---------"])
def test_replicas_share_what_one_process_chooses(
    teaches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, rewards, metrics = sample_dynamically(Generator(teaches), NUM_GROUPS, 2, CONTEXT)

    def on_one(context: ParallelContext):
        return sample_dynamically(Generator(teaches, context), NUM_GROUPS, 2, context)

    parts = on_replicas(3, on_one, monkeypatch)
    assert sum((batch.rollouts for batch, _, _ in parts), ()) == whole.rollouts
    assert torch.cat([share for _, share, _ in parts]).tolist() == rewards.tolist()
    for batch, share, found in parts:
        assert len(batch.rollouts) == len(share) == GROUP_SIZE
        assert found == pytest.approx(metrics)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 10))
def test_choice_is_of_distinct_groups_and_no_better_one_is_left(is_equal, num_groups) -> None:
    chosen = choose_groups(is_equal, num_groups)
    assert len(chosen) == len(set(chosen)) == min(num_groups, len(is_equal))
    flags = [is_equal[place] for place in chosen]
    assert flags == sorted(flags)
    left = [place for place in range(len(is_equal)) if place not in chosen]
    for place in left:
        if not is_equal[place]:
            assert not any(flags)
        same_kind = [one for one in chosen if is_equal[one] == is_equal[place]]
        assert all(one < place for one in same_kind)


def test_a_group_is_equal_as_a_whole() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert equal_groups(rewards, 2).tolist() == [True, True, False, False, True, True]
    assert equal_groups(rewards, 3).tolist() == [True] * 6
    assert equal_groups(rewards, 6).tolist() == [False] * 6


@pytest.mark.parametrize("method", ["grpo", "reinforce_plus_plus_baseline"])
def test_groups_that_fill_up_have_no_part_in_the_advantages(method: str) -> None:
    # Shaping has made their rewards unequal.
    rewards = torch.tensor([1.0, 0.0, 5.0, -5.0, 0.5, 0.25])
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    batch = Generator("+-+")(0)[0]
    left_out = Experience(batch, scores).left_out(filter_groups=True)
    assert left_out.tolist() == [False, False, True, True, False, False]
    found = replica_advantages(rewards, left_out, method, GROUP_SIZE, CONTEXT)
    alone = group_relative_advantages(rewards[~left_out], method, group_size=GROUP_SIZE)
    assert torch.equal(found[~left_out], alone)
    assert found[left_out].tolist() == [0.0, 0.0]
    nobody = Experience(batch, scores).left_out(filter_groups=False)
    assert not nobody.any()
    everybody = replica_advantages(rewards, ~nobody, method, GROUP_SIZE, CONTEXT)
    assert everybody.tolist() == [0.0] * 6


@pytest.mark.parametrize("method", get_args(AdvantageMethod))
def test_replicas_are_judged_within_the_global_batch(
    method: AdvantageMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = torch.tensor([1.0, 0.0, 5.0, -5.0, 0.5, 0.25])
    left_out = torch.tensor([False, False, True, True, False, False])

    def on_one(context: ParallelContext):
        rows = slice(GROUP_SIZE * context.data.rank, GROUP_SIZE * (context.data.rank + 1))
        return replica_advantages(rewards[rows], left_out[rows], method, GROUP_SIZE, context)

    expected = replica_advantages(rewards, left_out, method, GROUP_SIZE, CONTEXT)
    assert expected.tolist() != [0.0] * 6
    assert torch.equal(torch.cat(on_replicas(3, on_one, monkeypatch)), expected)


def test_rows_without_a_response_count_for_nothing() -> None:
    rollouts = Generator("+-+")(0)[0].rollouts
    batch = TrainingBatch.from_rollouts(rollouts, torch.ones(6), 0)
    left_out = torch.tensor([False, False, True, True, False, False])
    masked = batch.without_responses(left_out)
    assert masked.response_mask[left_out].sum() == 0
    assert torch.equal(masked.response_mask[~left_out], batch.response_mask[~left_out])
    assert masked.num_response_tokens == 8
    assert batch.num_response_tokens == 12


def test_a_group_of_one_has_nothing_to_filter() -> None:
    made = config(algorithm={"filter_groups": True}, rollout={"group_size": 1})
    assert "algorithm.filter_groups=true with rollout.group_size=1" in refusal(made)
