"""From a step's scores to the advantages of this replica's completions."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import AdvantageMethod, group_relative_advantages
from nested_reft_mcore.algorithm.importance import log_importance_ratio
from nested_reft_mcore.algorithm.kl import sequence_kl
from nested_reft_mcore.algorithm.shaping import length_penalty, overlong_penalty
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.replicas import gather_from_replicas


def shaped_rewards(
    scores: Tensor, rollouts: RolloutBatch, batch: TrainingBatch, config: Config
) -> Tensor:
    """Scores `[batch]` less what length and distance from the reference cost, float32.

    The KL is that of the policy that is about to be updated, over this replica's `batch`, which
    then needs `old_logprobs` and `ref_logprobs`.
    """
    reward, algorithm, longest = config.reward, config.algorithm, config.rollout.max_new_tokens
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts.rollouts])
    rewards = scores
    if reward.overlong_buffer_len:
        rewards = rewards + overlong_penalty(
            lengths, longest, reward.overlong_buffer_len, reward.overlong_penalty_factor
        )
    if reward.length_penalty:
        rewards = rewards + length_penalty(lengths, longest, reward.length_penalty)
    if algorithm.kl_reward_coef:
        assert batch.ref_logprobs is not None
        assert batch.old_logprobs is not None
        log_ratio = log_importance_ratio(
            batch.ref_logprobs, batch.old_logprobs, batch.response_mask, algorithm.log_ratio_clamp
        )
        rewards = rewards - algorithm.kl_reward_coef * sequence_kl(log_ratio, algorithm.kl_penalty)
    return rewards


def replica_advantages(
    rewards: Tensor,
    left_out: Tensor,
    method: AdvantageMethod,
    group_size: int,
    context: ParallelContext,
) -> Tensor:
    """Advantages `[batch]` of this replica's completions, judged within the global batch.

    Groups that are `left_out`, `[batch]` bool, have advantage 0 and no part in any statistic.
    """
    gathered = gather_from_replicas((rewards, left_out), context)
    everything = torch.cat([part for part, _ in gathered])
    counted = ~torch.cat([part for _, part in gathered])
    advantages = torch.zeros_like(everything)
    if counted.any():
        advantages[counted] = group_relative_advantages(
            everything[counted], method, group_size=group_size
        )
    start = sum(len(part) for part, _ in gathered[: context.data.rank])
    return advantages[start : start + len(rewards)]
