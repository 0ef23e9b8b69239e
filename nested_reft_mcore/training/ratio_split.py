"""Where log(behavior / target) comes from: engine noise, skipped layers, stale weights.

For each sampled token, in nats,

    behavior_logprobs - target_logprobs  =  engine  +  skip  +  stale

    engine  what the rollout engine reported, less the training forward under the same plan
    skip    the training forward under the plan, less the same at full depth
    stale   full depth before the step's first update, less full depth at this mini-batch

so the three means add up to `rollout_corr/kl` wherever its target is the policy at the mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.training.replicas import add_up, gather_from_replicas

_NUM_TOKENS = "tokens"
PARTS = ("nested/kl_engine", "nested/kl_skip", "nested/kl_stale")
ENGINE_NOISE_LIMITS = {"float32": 1e-6, "bfloat16": 1e-2}
"""Largest |k3| in nats, by the type of the weights, that rounding explains."""


@dataclass(frozen=True)
class RatioSplit:
    """Log-probs of a step's batch before its first update, `[batch, seq]` float32 on the CPU."""

    batch: TrainingBatch
    nested_logprobs: Tensor
    """Of the training forward under the plan of the rollouts."""
    full_logprobs: Tensor
    """Of the training forward at full depth."""

    @classmethod
    def measure(
        cls,
        logprobs: Callable[[TrainingBatch], Tensor],
        policy: Policy,
        batch: TrainingBatch,
        plan: LayerSkipPlan,
    ) -> RatioSplit:
        """Two passes of `logprobs`, one where the batch has `old_logprobs`; all processes call it.

        `logprobs` is a training forward under the policy as it stands.
        """
        with policy.nested(plan):
            nested = logprobs(batch)
        full = batch.old_logprobs
        return cls(batch, nested, logprobs(batch) if full is None else full.cpu())

    def metrics(
        self, updates_logprobs: Sequence[Tensor], context: ParallelContext
    ) -> dict[str, float]:
        """Means of the three parts over the global batch, in nats; every process calls it.

        `updates_logprobs` are the target's log-probs that each update saw, its mini-batch dealt as
        `TrainingBatch.deal` does. As for all metrics of a step, tokens of all updates count alike.
        """
        num_updates = len(updates_logprobs)
        mine = [
            self._sums(slice(number, None, num_updates), target)
            for number, target in enumerate(updates_logprobs)
        ]
        total = add_up(
            [sums for replica in gather_from_replicas(mine, context) for sums in replica]
        )
        tokens = max(total.pop(_NUM_TOKENS), 1.0)
        return {name: value / tokens for name, value in total.items()}

    def _sums(self, rows: slice, target: Tensor) -> dict[str, float]:
        chain = torch.stack(
            [
                self.batch.behavior_logprobs[rows].double().cpu(),
                self.nested_logprobs[rows].double(),
                self.full_logprobs[rows].double(),
                target.double(),
            ]
        )
        # A token with a log-prob that is not finite has no ratio: it counts nowhere.
        counted = self.batch.response_mask[rows].cpu() & torch.isfinite(chain).all(dim=0)
        links = (chain[:-1] - chain[1:])[:, counted].sum(dim=1).tolist()
        return dict(zip(PARTS, links, strict=True)) | {_NUM_TOKENS: float(counted.sum())}


def explain_engine_noise(k3_kl: float, dtype: str) -> str | None:
    """What to say of rollouts with nothing skipped whose weights had not changed; None if all well.

    `k3_kl` is `rollout_corr/k3_kl` of the first update, which is 0 but for rounding.
    """
    limit = ENGINE_NOISE_LIMITS[dtype]
    if abs(k3_kl) < limit:
        return None
    return (
        f"nothing is skipped and nothing has been updated, but rollout_corr/k3_kl is {k3_kl:.3g} "
        f"nats; rounding in {dtype} explains less than {limit:g}. The rollout engine and the "
        "training forward disagree about the same weights: every importance ratio is off by that. "
        "diagnostics.split_every=1 shows it step by step as nested/kl_engine"
    )
