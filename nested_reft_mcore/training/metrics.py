"""Metrics of a step's rollouts, under verl's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.replicas import gather_from_replicas

LAYER_PASSES = "nested/layer_passes/stage_"
"""Followed by the pipeline rank: layers that it ran while decoding, summed over forward passes."""


def rollout_metrics(
    rollouts: RolloutBatch, scores: Tensor, rewards: Tensor, context: ParallelContext
) -> dict[str, float]:
    """Scores, rewards (shaped), lengths, plan and generation speed over the global batch."""
    replicas = gather_from_replicas(_columns(rollouts, scores, rewards), context)
    columns = {name: [v for replica in replicas for v in replica[name]] for name in replicas[0]}
    plan = rollouts.plan
    executed = [sum(passes) for passes in zip(*(r["layer_passes"] for r in replicas), strict=True)]
    # Of all generations of the step, those of groups that were not taken too.
    generated = sum(columns["generated_tokens"])
    metrics = {
        **_spread("critic/score", columns["scores"]),
        **_spread("critic/rewards", columns["rewards"]),
        **_spread("response_length", columns["response_length"]),
        **_spread("prompt_length", columns["prompt_length"]),
        "response_length/clip_ratio": _mean(columns["is_clipped"]),
        "nested/skip_ratio": plan.skip_ratio,
        "nested/num_skipped": float(plan.num_skipped),
        "perf/total_num_tokens": generated + sum(columns["prompt_length"]),
        "perf/generated_tokens": generated,
    }
    drafted, accepted = sum(columns["drafted"]), sum(columns["accepted"])
    if rollouts.stats.draft_skip_ratio:
        metrics["nested/draft_skip_ratio"] = rollouts.stats.draft_skip_ratio
    if drafted:
        metrics["nested/accept_rate"] = accepted / drafted
    metrics["rollout/num_nan"] = sum(columns["is_nan"])
    metrics["perf/rollout_waiting_share"] = max(columns["waiting_shares"], default=0.0)
    metrics["perf/kv_cache_gb"] = max(columns["kv_cache_bytes"], default=0) / 1e9
    seconds = max(columns["seconds"])
    if seconds > 0:
        metrics["perf/generated_tokens_per_second"] = generated / seconds
    # Counted on every rank while it decoded; one part of a layer is half a pass.
    metrics |= {f"{LAYER_PASSES}{i}": float(count) for i, count in enumerate(executed)}
    if sum(executed) > 0:
        # 1 where every stage has the same work; the fullest stage sets the pace.
        metrics["nested/stage_imbalance"] = max(executed) * len(executed) / sum(executed)
    metrics["critic/solve_none"], metrics["critic/solve_all"] = _equal_groups(
        columns["scores"], rollouts.group_size
    )
    return metrics | _by_dataset(columns["dataset"], columns["scores"])


def _by_dataset(names: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Mean scores of each data set, where there are several."""
    distinct = sorted(set(names))
    if len(distinct) < 2:
        return {}
    pairs = list(zip(names, scores, strict=True))
    return {
        f"critic/score/mean/{name}": _mean([score for of, score in pairs if of == name])
        for name in distinct
    }


def _columns(rollouts: RolloutBatch, scores: Tensor, rewards: Tensor) -> dict[str, list[Any]]:
    return {
        "scores": scores.tolist(),
        "dataset": [rollout.prompt.dataset for rollout in rollouts.rollouts],
        "rewards": rewards.tolist(),
        "response_length": [len(rollout.token_ids) for rollout in rollouts.rollouts],
        "prompt_length": [len(rollout.prompt.token_ids) for rollout in rollouts.rollouts],
        "is_clipped": [float(r.is_truncated) for r in rollouts.rollouts],
        "is_nan": [float(r.finish_reason == "nan") for r in rollouts.rollouts],
        "seconds": [rollouts.stats.seconds],
        "generated_tokens": [rollouts.stats.generated_tokens],
        "drafted": [rollouts.stats.drafted_tokens],
        "accepted": [rollouts.stats.accepted_tokens],
        "waiting_shares": list(rollouts.stats.waiting_shares),
        "kv_cache_bytes": list(rollouts.stats.kv_cache_bytes),
        "layer_passes": list(rollouts.stats.layer_executions),
    }


def _equal_groups(rewards: Sequence[float], group_size: int) -> tuple[float, float]:
    """Shares of groups that teach nothing: all rewards at most 0; all equal and positive."""
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    none = [float(max(group) <= 0) for group in groups]
    every = [float(min(group) > 0 and min(group) == max(group)) for group in groups]
    return _mean(none), _mean(every)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}/mean": _mean(values),
        f"{name}/max": float(max(values)),
        f"{name}/min": float(min(values)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
