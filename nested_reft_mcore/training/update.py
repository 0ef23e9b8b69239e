"""One optimizer step of the policy, at full depth by default, on a mini-batch of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.diagnostics import MetricTerms
from nested_reft_mcore.algorithm.importance import CorrectionSettings
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.algorithm.rejection import RejectionRule
from nested_reft_mcore.config.corrections import read_correction, read_rejections
from nested_reft_mcore.config.schema import AlgorithmConfig, Config
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.pipeline import (
    PassResult,
    broadcast_object,
    forward_logprobs,
    run_batch,
)
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.reference import ReferencePolicy
from nested_reft_mcore.training.replicas import gather_from_replicas


@dataclass(frozen=True)
class UpdateResult:
    """What an update did, the same on every process."""

    applied: bool
    """False where the gradient was not finite and the weights stayed as they were."""
    terms: MetricTerms
    """Of the global mini-batch."""
    figures: dict[str, float]
    """Of the update as such: gradient norm, learning rate, padding."""
    logprobs: Tensor
    """`[batch, seq]` float32 on the CPU: this replica's, of the labels, before the update."""

    @property
    def metrics(self) -> dict[str, float]:
        """Over the global mini-batch."""
        return self.terms.metrics() | self.figures


def objective_settings(config: AlgorithmConfig, max_response_length: int) -> ObjectiveSettings:
    """The objective that a configuration asks for."""
    correction = read_correction(config)
    return ObjectiveSettings(
        objective=config.objective,
        correction=correction.name,
        correction_settings=CorrectionSettings(
            retrace_lambda=config.retrace_lambda,
            lower=correction.lower,
            upper=correction.upper,
            log_clamp=config.log_ratio_clamp,
        ),
        rejections=tuple(
            RejectionRule(rule.name, rule.upper, rule.lower) for rule in read_rejections(config)
        ),
        log_ratio_clamp=config.log_ratio_clamp,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        clip_ratio_c=config.clip_ratio_c,
        bypass_mode=config.bypass_mode,
        loss_agg_mode=config.loss_agg_mode,
        max_response_length=max_response_length,
        entropy_coeff=config.entropy_coeff,
        kl_loss_coef=config.kl_loss_coef,
        kl_loss_type=config.kl_loss_type,
        kl_corrected=config.kl_corrected,
    )


class Learner:
    """Turns a replica's rollouts into updates of the policy."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        optimizer: PolicyOptimizer,
        reference: ReferencePolicy | None,
        pad_token_id: int,
        timers: Timers,
    ) -> None:
        algorithm = config.algorithm
        self._settings = objective_settings(algorithm, config.rollout.max_new_tokens)
        self._needs_old_logprobs = self._settings.needs_old_logprobs or algorithm.kl_reward_coef > 0
        self._pass_options = {
            "micro_batch_size": config.train.micro_batch_size,
            "max_tokens_per_micro_batch": config.train.max_tokens_per_micro_batch,
            "logprob_chunk_tokens": config.train.logprob_chunk_tokens,
        }
        self._temperature = config.rollout.temperature
        self._policy = policy
        self._optimizer = optimizer
        self._reference = reference
        self._pad_token_id = pad_token_id
        self._timers = timers

    def training_batch(self, rollouts: RolloutBatch) -> TrainingBatch:
        """The rollouts as tensors, advantages still 0, with the log-probs that are asked for.

        Those are the old ones if the objective or a KL in the rewards compares with them, and the
        reference's if there is one.
        """
        batch = TrainingBatch.from_rollouts(
            rollouts.rollouts,
            torch.zeros(len(rollouts.rollouts)),
            self._pad_token_id,
            # Sequence parallelism cuts the sequence into equal parts.
            pad_to_multiple=self._policy.context.tensor.size,
        )
        if self._needs_old_logprobs:
            with self._timers("old_log_prob"):
                batch = batch.with_old_logprobs(self.logprobs(batch))
        if self._reference is not None:
            with self._timers("ref"), self._reference.in_place():
                batch = batch.with_ref_logprobs(self.logprobs(batch))
        return batch

    def logprobs(self, batch: TrainingBatch) -> Tensor:
        """`[batch, seq]` float32 on the CPU: of the labels, under the policy as it stands."""
        return forward_logprobs(
            self._policy, batch, temperature=self._temperature, **self._pass_options
        )

    def update(self, batch: TrainingBatch, dropped: LayerSkipPlan | None = None) -> UpdateResult:
        """Take one step on `batch`, this replica's share of the global mini-batch.

        With layer dropout the target policy, whose log-probs and gradient these are, is the one
        without the `dropped` layers, which move by momentum and weight decay alone.
        The loss is divided by a denominator of the global mini-batch (`loss_agg_mode`), rejected
        tokens left out. A step whose gradient is not finite is not taken.
        """
        dropped = dropped or LayerSkipPlan.full(self._policy.architecture.num_layers)
        with self._timers("update_actor"), self._policy.nested(dropped):
            self._optimizer.zero_grad()
            result = run_batch(
                self._policy,
                batch,
                partial(_micro_batch_loss, settings=self._settings),
                temperature=self._temperature,
                **self._pass_options,
            )
            outcome = self._optimizer.step()
        figures = {
            "perf/padding_share": _padding_share(result, self._policy.context),
            "actor/grad_norm": outcome.grad_norm,
            "actor/lr": outcome.lr,
            "actor/num_dropped_layers": float(dropped.num_skipped),
        }
        terms = _global_terms(result.outputs, self._policy.context)
        return UpdateResult(outcome.applied, terms, figures, result.logprobs)


def metrics_of_step(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Over the tokens of all updates at once; of what an update is as such, the mean over them."""
    names = updates[0].figures
    means = {name: sum(u.figures[name] for u in updates) / len(updates) for name in names}
    return MetricTerms.total([update.terms for update in updates]).metrics() | means


def _micro_batch_loss(
    logprobs: Tensor, entropies: Tensor, batch: TrainingBatch, *, settings: ObjectiveSettings
) -> tuple[Tensor, Tensor, MetricTerms]:
    output = policy_loss(
        LossInputs(
            target_logprobs=logprobs,
            behavior_logprobs=batch.behavior_logprobs,
            advantages=batch.advantages,
            response_mask=batch.response_mask,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            entropy=entropies,
        ),
        settings,
    )
    terms = MetricTerms(output.metrics, output.maxima, output.log_ratios)
    return output.loss_sum, output.denominator, terms


def _global_terms(micro_batches: list[MetricTerms], context: ParallelContext) -> MetricTerms:
    """The last stage's terms, over micro-batches and replicas."""
    local: MetricTerms | None = None
    if context.is_last_stage:
        # Read back here, when the schedule is over, and not between its passes.
        local = MetricTerms.total(micro_batches).on_host()
    of_replica = broadcast_object(local, context)
    assert of_replica is not None, "the last stage has it"
    return MetricTerms.total(gather_from_replicas(of_replica, context))


def _padding_share(result: PassResult, context: ParallelContext) -> float:
    """Of the places that pass through the model, those that no loss or context needs."""
    counts = gather_from_replicas((result.num_tokens, result.num_places), context)
    return 1 - sum(tokens for tokens, _ in counts) / sum(places for _, places in counts)
