"""From a step's scores to the advantages of this replica's completions."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import AdvantageMethod, group_relative_advantages
from nested_reft_mcore.algorithm.shaping import length_penalty, overlong_penalty
from nested_reft_mcore.config.schema import RewardConfig
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.replicas import gather_from_replicas


def shape_rewards(
    scores: Tensor, rollouts: RolloutBatch, config: RewardConfig, max_new_tokens: int
) -> Tensor:
    """Scores `[batch]` less what length costs, float32."""
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts.rollouts])
    rewards = scores
    if config.overlong_buffer_len:
        rewards = rewards + overlong_penalty(
            lengths, max_new_tokens, config.overlong_buffer_len, config.overlong_penalty_factor
        )
    if config.length_penalty:
        rewards = rewards + length_penalty(lengths, max_new_tokens, config.length_penalty)
    return rewards


def replica_advantages(
    rewards: Tensor, method: AdvantageMethod, group_size: int, context: ParallelContext
) -> Tensor:
    """Advantages `[batch]` of this replica's completions, judged within the global batch."""
    gathered = gather_from_replicas(rewards, context)
    advantages = group_relative_advantages(torch.cat(gathered), method, group_size=group_size)
    start = sum(len(part) for part in gathered[: context.data.rank])
    return advantages[start : start + len(rewards)]
