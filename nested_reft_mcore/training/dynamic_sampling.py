"""Groups whose rewards are all equal teach nothing: drop them, and generate others instead.

DAPO's dynamic sampling (arXiv 2503.14476), bounded: a step's prompts are generated at most
1 + max_refills times. Which groups are taken depends on their order in the global batch alone, and
they are dealt out again over the replicas, so that the number of replicas changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import equal_groups
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.types import Rollout, RolloutBatch, RolloutStats
from nested_reft_mcore.training.replicas import gather_from_replicas

Generate = Callable[[int], tuple[RolloutBatch, Tensor]]
"""Number of the refill to this replica's share of it, `prompt_index` counted over all refills."""


@dataclass(frozen=True)
class _Group:
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]


def choose_groups(is_equal: Sequence[bool], num_groups: int) -> list[int]:
    """The first `num_groups` groups that teach; where they are too few, the first others last."""
    teaching = [place for place, equal in enumerate(is_equal) if not equal][:num_groups]
    others = [place for place, equal in enumerate(is_equal) if equal]
    return teaching + others[: num_groups - len(teaching)]


def sample_dynamically(
    generate: Generate, num_groups: int, max_refills: int, context: ParallelContext
) -> tuple[RolloutBatch, Tensor, dict[str, float]]:
    """Generate until `num_groups` groups of the global batch teach; every process calls it.

    Where they are too few after `max_refills` refills, groups with equal rewards fill the batch up:
    they are the ones that `equal_groups` still finds, for the caller to mask.

    Returns:
        This replica's share (numbered anew by its place in the chosen batch, its stats those of all
        that this replica generated), its rewards `[batch]` float32, and metrics.
    """
    groups: dict[int, _Group] = {}
    stats: list[RolloutStats] = []
    rewards_of_all: list[float] = []
    for refill in range(max_refills + 1):
        batch, rewards = generate(refill)
        stats.append(batch.stats)
        by_group = rewards.view(-1, batch.group_size).tolist()
        for rollouts, values in zip(batch.groups(), by_group, strict=True):
            groups[rollouts[0].prompt_index] = _Group(rollouts, tuple(values))
        for values in gather_from_replicas(rewards.tolist(), context):
            rewards_of_all += values
        flags = equal_groups(torch.tensor(rewards_of_all), batch.group_size)
        is_equal = flags[:: batch.group_size].tolist()
        num_teaching = len(is_equal) - sum(is_equal)
        if num_teaching >= num_groups:
            break
    share, share_rewards = _deal(groups, choose_groups(is_equal, num_groups), context)
    metrics = {
        "rollout/num_refills": float(refill),
        "rollout/num_filtered_groups": float(sum(is_equal)),
        "rollout/num_filled_groups": float(max(0, num_groups - num_teaching)),
        "rollout/rewards_before_filtering/mean": sum(rewards_of_all) / len(rewards_of_all),
    }
    return replace(batch, rollouts=share, stats=RolloutStats.total(stats)), share_rewards, metrics


def _deal(
    groups: dict[int, _Group], chosen: Sequence[int], context: ParallelContext
) -> tuple[tuple[Rollout, ...], Tensor]:
    """This replica's contiguous share of the chosen groups, wherever they were generated."""
    mine = {index: groups[index] for index in chosen if index in groups}
    everywhere: dict[int, _Group] = {}
    for found in gather_from_replicas(mine, context):
        everywhere |= found
    share = shard_range(len(chosen), context.data.rank, context.data.size)
    rollouts = tuple(
        replace(rollout, prompt_index=place)
        for place in share
        for rollout in everywhere[chosen[place]].rollouts
    )
    rewards = [value for place in share for value in everywhere[chosen[place]].rewards]
    return rollouts, torch.tensor(rewards, dtype=torch.float32)
