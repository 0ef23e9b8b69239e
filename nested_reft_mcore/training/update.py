"""One optimizer step of the full-depth policy on a mini-batch of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.diagnostics import finalize_metrics, ratio_p05
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.config.schema import AlgorithmConfig, Config
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.pipeline import broadcast_object, forward_logprobs, run_batch
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.replicas import add_up, gather_from_replicas


@dataclass(frozen=True)
class UpdateResult:
    """What an update did, the same on every process."""

    applied: bool
    """False where the gradient was not finite and the weights stayed as they were."""
    metrics: dict[str, float]
    """Over the global mini-batch."""
    logprobs: Tensor
    """`[batch, seq]` float32 on the CPU: this replica's, of the labels, before the update."""


def objective_settings(config: AlgorithmConfig) -> ObjectiveSettings:
    """The objective that a configuration asks for."""
    return ObjectiveSettings(
        objective=config.objective,
        correction=config.correction,
        retrace_lambda=config.retrace_lambda,
        log_ratio_clamp=config.log_ratio_clamp,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        bypass_mode=config.bypass_mode,
    )


class Learner:
    """Turns a replica's rollouts into updates of the full-depth policy."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        optimizer: PolicyOptimizer,
        pad_token_id: int,
        timers: Timers,
    ) -> None:
        self._settings = objective_settings(config.algorithm)
        self._micro_batch_size = config.train.micro_batch_size
        self._temperature = config.rollout.temperature
        self._policy = policy
        self._optimizer = optimizer
        self._pad_token_id = pad_token_id
        self._timers = timers

    def training_batch(self, rollouts: RolloutBatch, advantages: Tensor) -> TrainingBatch:
        """The rollouts as tensors, with old log-probs if the objective compares with them."""
        batch = TrainingBatch.from_rollouts(
            rollouts.rollouts,
            advantages,
            self._pad_token_id,
            # Sequence parallelism cuts the sequence into equal parts.
            pad_to_multiple=self._policy.context.tensor.size,
        )
        if self._settings.objective != "ppo_clip" or self._settings.bypass_mode:
            return batch
        with self._timers("old_log_prob"):
            return batch.with_old_logprobs(self.logprobs(batch))

    def logprobs(self, batch: TrainingBatch) -> Tensor:
        """`[batch, seq]` float32 on the CPU: of the labels, under the policy as it stands."""
        return forward_logprobs(
            self._policy,
            batch,
            micro_batch_size=self._micro_batch_size,
            temperature=self._temperature,
        )

    def update(self, batch: TrainingBatch) -> UpdateResult:
        """Take one step on `batch`, this replica's share of the global mini-batch.

        The loss is the token mean over the global mini-batch, rejected tokens left out. A step
        whose gradient is not finite is not taken.
        """
        with self._timers("update_actor"):
            self._optimizer.zero_grad()
            result = run_batch(
                self._policy,
                batch,
                partial(_micro_batch_loss, settings=self._settings),
                micro_batch_size=self._micro_batch_size,
                temperature=self._temperature,
            )
            outcome = self._optimizer.step()
        metrics = _global_metrics(result.outputs, self._policy.context)
        metrics["actor/grad_norm"] = outcome.grad_norm
        metrics["actor/lr"] = outcome.lr
        return UpdateResult(outcome.applied, metrics, result.logprobs)


def mean_over_updates(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Metrics of a step: means over its updates."""
    names = [name for name in updates[0].metrics if all(name in u.metrics for u in updates)]
    return {name: sum(u.metrics[name] for u in updates) / len(updates) for name in names}


def _micro_batch_loss(
    logprobs: Tensor, entropies: Tensor, batch: TrainingBatch, *, settings: ObjectiveSettings
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    output = policy_loss(
        LossInputs(
            target_logprobs=logprobs,
            behavior_logprobs=batch.behavior_logprobs,
            advantages=batch.advantages,
            response_mask=batch.response_mask,
            old_logprobs=batch.old_logprobs,
            entropy=entropies,
        ),
        settings,
    )
    terms = {
        "num_tokens": output.num_tokens,
        "sums": output.metrics,
        "maxima": output.maxima,
        "log_ratios": output.log_ratios,
    }
    return output.loss_sum, output.num_tokens, terms


def _global_metrics(
    micro_batches: list[dict[str, Any]], context: ParallelContext
) -> dict[str, float]:
    """Add the last stage's terms over micro-batches and replicas, and divide once."""
    local: dict[str, Any] = {}
    if context.is_last_stage:
        local = {
            "num_tokens": sum(int(terms["num_tokens"]) for terms in micro_batches),
            "sums": add_up(terms["sums"] for terms in micro_batches),
            "maxima": _largest(terms["maxima"] for terms in micro_batches),
            "log_ratios": torch.cat([terms["log_ratios"].cpu() for terms in micro_batches]),
        }
    replicas = gather_from_replicas(broadcast_object(local, context), context)
    metrics = finalize_metrics(
        add_up(replica["sums"] for replica in replicas),
        sum(replica["num_tokens"] for replica in replicas),
        _largest(replica["maxima"] for replica in replicas),
    )
    log_ratios = torch.cat([replica["log_ratios"] for replica in replicas])
    return metrics | {"nested/ratio_p05": ratio_p05(log_ratios)}


def _largest(parts: Any) -> dict[str, float]:
    largest: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            largest[name] = max(largest.get(name, float("-inf")), float(value))
    return largest
