"""Policy-gradient objectives as pure functions of log-probabilities, advantages and a mask.

A loss is a SUM over tokens next to the number of tokens it sums. Whoever owns the global batch
adds both over micro-batches and replicas and divides once, so that no split changes the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.diagnostics import off_policy_maxima, off_policy_sums
from nested_reft_mcore.algorithm.importance import (
    CORRECTIONS,
    CorrectionSettings,
    LogRatio,
    correction_weights,
    log_importance_ratio,
)
from nested_reft_mcore.algorithm.masking import fill_masked, masked_sum

Objective = Literal["reinforce", "ppo_clip"]


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch, aligned with `labels`; only `target_logprobs` and `entropy` have gradients.

    Raises ValueError where shapes disagree.
    """

    target_logprobs: Float[Tensor, "batch seq"]
    """Nats, of the policy that is updated, at the sampling temperature."""
    behavior_logprobs: Float[Tensor, "batch seq"]
    """Nats, of the distribution really sampled from."""
    advantages: Float[Tensor, " batch"]
    """One per completion."""
    response_mask: Bool[Tensor, "batch seq"]
    """True for sampled tokens; elsewhere values are never looked at, NaN included."""
    old_logprobs: Float[Tensor, "batch seq"] | None = None
    """Nats, of the target policy before the step's first update; decoupled PPO needs it."""
    entropy: Float[Tensor, "batch seq"] | None = None
    """Nats, of the target policy's next-token distribution; reported, not optimised."""

    def __post_init__(self) -> None:
        shape = self.target_logprobs.shape
        for name in ("behavior_logprobs", "response_mask", "old_logprobs", "entropy"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, target_logprobs {tuple(shape)}"
                )
        if self.advantages.shape != shape[:1]:
            raise ValueError(
                f"advantages has shape {tuple(self.advantages.shape)}, expected {tuple(shape[:1])}"
            )


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which objective and correction; raises ValueError for combinations that make no sense."""

    objective: Objective = "reinforce"
    correction: str = "practical"
    retrace_lambda: float = 1.0
    log_ratio_clamp: float = 20.0
    """Nats; see `log_importance_ratio`."""
    clip_ratio_low: float = 0.2
    """PPO: the ratio is clipped below 1 - this."""
    clip_ratio_high: float = 0.2
    """PPO: the ratio is clipped above 1 + this."""
    bypass_mode: bool = False
    """PPO: the ratio is target / behavior, and no old log-probs are needed."""

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"unknown objective {self.objective!r}: choose one of {get_args(Objective)}"
            )
        if self.correction not in CORRECTIONS:
            raise ValueError(
                f"unknown correction {self.correction!r}: choose one of {', '.join(CORRECTIONS)}"
            )
        if self.clip_ratio_low < 0 or self.clip_ratio_high < 0:
            raise ValueError(
                "clip_ratio_low and clip_ratio_high are distances from 1 and cannot be negative, "
                f"got {self.clip_ratio_low} and {self.clip_ratio_high}"
            )
        if self.bypass_mode and self.objective != "ppo_clip":
            raise ValueError(
                f"bypass_mode chooses the ratio of ppo_clip, {self.objective} has none"
            )
        if self.bypass_mode and self.correction != "practical":
            raise ValueError(
                f"bypass_mode with correction {self.correction!r} would count target / behavior "
                "twice, once in the clipped ratio: use correction 'practical' or decoupled mode"
            )


@dataclass(frozen=True)
class LossOutput:
    """What a micro-batch adds to the global batch."""

    loss_sum: Float[Tensor, ""]
    """Sum of the token losses; not divided by anything."""
    num_tokens: Int64[Tensor, ""]
    """Tokens in the sum: this micro-batch's share of the denominator."""
    metrics: dict[str, Float[Tensor, ""]]
    """Sums over the same tokens, float64, without gradient; see `finalize_metrics`."""
    maxima: dict[str, Float[Tensor, ""]]
    """Combined by maximum; float64, without gradient."""
    log_ratios: Float[Tensor, " tokens"]
    """Log of the correction's ratio for the kept tokens, for `ratio_p05`; without gradient."""


def policy_loss(inputs: LossInputs, settings: ObjectiveSettings) -> LossOutput:
    """The objective over one micro-batch, summed over its kept tokens.

    With A the completion's advantage, sg the stopped gradient and c the correction:
    `reinforce` is -sg(c(target / behavior)) * A * target_logprob (arXiv 2508.10123);
    `ppo_clip` is -sg(c) * min(r A, clip(r, 1 - low, 1 + high) A) (arXiv 1707.06347), where
    decoupled r = target / old and c = c(old / behavior) (arXiv 2110.00641), and with `bypass_mode`
    r = target / behavior and c = 1.

    A token is kept if the response mask holds it, its ratios are finite and its correction keeps
    it. All other positions influence nothing, and their gradients are exactly 0. Raises ValueError
    where decoupled PPO gets no old log-probs.
    """
    numerator = _correction_numerator(inputs, settings)
    off_policy = log_importance_ratio(
        numerator, inputs.behavior_logprobs, inputs.response_mask, settings.log_ratio_clamp
    )
    correction = CorrectionSettings(retrace_lambda=settings.retrace_lambda)
    weights = correction_weights(settings.correction, off_policy, correction)
    if settings.objective == "reinforce":
        token = _reinforce(inputs, weights.kept)
    else:
        token = _ppo_clip(inputs, settings, weights.kept)
    off_policy = LogRatio(
        off_policy.values, token.kept, off_policy.num_non_finite + token.num_non_finite
    )
    losses = weights.weights * token.losses
    token_metrics = {"actor/pg_loss": losses.detach()} | token.metrics
    if inputs.entropy is not None:
        token_metrics["actor/entropy"] = inputs.entropy.detach()
    return LossOutput(
        loss_sum=masked_sum(losses, token.kept),
        num_tokens=token.kept.sum(),
        metrics=off_policy_sums(off_policy, numerator, inputs.behavior_logprobs)
        | {k: masked_sum(v, token.kept, torch.float64) for k, v in token_metrics.items()},
        maxima=off_policy_maxima(off_policy),
        log_ratios=off_policy.values[token.kept],
    )


@dataclass(frozen=True)
class _TokenLosses:
    """Losses before correction, 0 where not kept, and per-token metrics of the objective."""

    losses: Float[Tensor, "batch seq"]
    kept: Bool[Tensor, "batch seq"]
    num_non_finite: Int64[Tensor, ""]
    metrics: dict[str, Float[Tensor, "batch seq"]]


def _correction_numerator(
    inputs: LossInputs, settings: ObjectiveSettings
) -> Float[Tensor, "batch seq"]:
    """The policy that the correction puts over the behavior policy, without gradient."""
    if settings.objective != "ppo_clip" or settings.bypass_mode:
        return inputs.target_logprobs.detach()
    if inputs.old_logprobs is None:
        raise ValueError("decoupled ppo_clip needs old_logprobs; bypass_mode does without them")
    return inputs.old_logprobs.detach()


def _reinforce(inputs: LossInputs, kept: Bool[Tensor, "batch seq"]) -> _TokenLosses:
    logprobs = fill_masked(inputs.target_logprobs, kept)
    losses = -_token_advantages(inputs, kept) * logprobs
    return _TokenLosses(losses, kept, torch.zeros_like(kept.sum()), {})


def _ppo_clip(
    inputs: LossInputs, settings: ObjectiveSettings, kept: Bool[Tensor, "batch seq"]
) -> _TokenLosses:
    anchor = inputs.behavior_logprobs if settings.bypass_mode else inputs.old_logprobs
    assert anchor is not None, "_correction_numerator has checked old_logprobs"
    log_ratio = log_importance_ratio(inputs.target_logprobs, anchor, kept, settings.log_ratio_clamp)
    kept = log_ratio.kept
    ratio = log_ratio.values.exp()
    clipped = ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)
    advantages = _token_advantages(inputs, kept)
    plain_losses, clipped_losses = -advantages * ratio, -advantages * clipped
    metrics = {
        "actor/ppo_kl": -log_ratio.values.detach(),
        "actor/pg_clipfrac": (clipped_losses > plain_losses).to(ratio.dtype),
    }
    losses = torch.maximum(plain_losses, clipped_losses)
    return _TokenLosses(losses, kept, log_ratio.num_non_finite, metrics)


def _token_advantages(
    inputs: LossInputs, kept: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Each completion's advantage at its kept tokens, 0 elsewhere, without gradient."""
    advantages = inputs.advantages.detach().to(inputs.target_logprobs.dtype)
    return fill_masked(advantages[:, None].expand(kept.shape), kept)
