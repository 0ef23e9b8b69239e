"""Policy-gradient objectives as pure functions of log-probabilities, advantages and a mask.

A loss is a SUM beside its share of a denominator (`aggregation`). Whoever owns the global batch
adds both over micro-batches and replicas and divides once, so that no split changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.aggregation import LossAggMode, aggregate
from nested_reft_mcore.algorithm.diagnostics import (
    MetricSums,
    off_policy_maxima,
    off_policy_sums,
    rejection_sums,
)
from nested_reft_mcore.algorithm.importance import (
    CORRECTIONS,
    CorrectionSettings,
    LogRatio,
    correction_weights,
    log_importance_ratio,
    mean_log_ratio,
)
from nested_reft_mcore.algorithm.kl import KlEstimator, kl_from_reference
from nested_reft_mcore.algorithm.masking import fill_masked, masked_sum
from nested_reft_mcore.algorithm.rejection import RejectionRule, accepted

Objective = Literal["reinforce", "ppo_clip", "cispo", "gspo"]


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch, aligned with `labels`; only `target_logprobs` and `entropy` get gradients,
    whatever else carries some: a ratio of the policy to itself still pulls at the policy.

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
    """Nats, of the target policy before the step's first update; the decoupled ratios need it."""
    ref_logprobs: Float[Tensor, "batch seq"] | None = None
    """Nats, of the reference policy; a KL term needs it."""
    entropy: Float[Tensor, "batch seq"] | None = None
    """Nats, of the target policy's next-token distribution; an entropy bonus needs it."""

    def __post_init__(self) -> None:
        shape = self.target_logprobs.shape
        for name in (
            "behavior_logprobs",
            "response_mask",
            "old_logprobs",
            "ref_logprobs",
            "entropy",
        ):
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
    """One of `CORRECTIONS`."""
    correction_settings: CorrectionSettings = field(default_factory=CorrectionSettings)
    rejections: tuple[RejectionRule, ...] = ()
    """Applied one after the other to the ratio that the correction sees."""
    log_ratio_clamp: float = 20.0
    """Nats; see `log_importance_ratio`."""
    clip_ratio_low: float = 0.2
    """The ratio is clipped below 1 - this."""
    clip_ratio_high: float = 0.2
    """The ratio is clipped above 1 + this."""
    clip_ratio_c: float | None = None
    """`ppo_clip` with a negative advantage: the loss is at most this times |A| (dual clip)."""
    bypass_mode: bool = False
    """The clipped ratio is target / behavior, and no old log-probs are needed."""
    loss_agg_mode: LossAggMode = "token-mean"
    max_response_length: int = 1
    """Tokens; the constant of `seq-mean-token-sum-norm`."""
    entropy_coeff: float = 0.0
    """Nats of entropy are worth this much loss."""
    kl_loss_coef: float = 0.0
    """Weight of the KL divergence from the reference policy in the loss."""
    kl_loss_type: KlEstimator = "k3"
    kl_corrected: bool = False
    """Weigh the KL estimate by target / behavior, with its gradient."""

    def __post_init__(self) -> None:
        if self.objective not in _OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.objective!r}: choose one of {', '.join(_OBJECTIVES)}"
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
        if self.clip_ratio_c is not None and self.clip_ratio_c <= 1:
            raise ValueError(f"clip_ratio_c is a ratio above 1, got {self.clip_ratio_c}")
        if self.bypass_mode and self.objective == "reinforce":
            raise ValueError("bypass_mode chooses a clipped ratio, reinforce has none")
        if self.bypass_mode and self.correction != "practical":
            raise ValueError(
                f"bypass_mode with correction {self.correction!r} would count target / behavior "
                "twice, once in the clipped ratio: use correction 'practical' or decoupled mode"
            )

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the ratio is target / old."""
        return self.objective != "reinforce" and not self.bypass_mode


@dataclass(frozen=True)
class LossOutput:
    """What a micro-batch adds to the global batch."""

    loss_sum: Float[Tensor, ""]
    """Aggregated loss; not divided by the denominator."""
    denominator: Int64[Tensor, ""]
    """This micro-batch's share of what the global sum is divided by."""
    metrics: MetricSums
    """Sums and the counts that divide them; float64, without gradient; see `finalize_metrics`."""
    maxima: dict[str, Float[Tensor, ""]]
    """Combined by maximum; float64, without gradient."""
    log_ratios: Float[Tensor, " tokens"]
    """Log of the correction's ratio for all response tokens where it is finite, for `ratio_p05`."""


def policy_loss(inputs: LossInputs, settings: ObjectiveSettings) -> LossOutput:
    """The objective over one micro-batch, aggregated over its kept tokens.

    With A the completion's advantage, sg the stopped gradient, c the correction and l = log target:
    `reinforce` is -sg(c(target / behavior)) A l (arXiv 2508.10123). The others have a ratio r:
    decoupled r = target / old beside c = c(old / behavior) (arXiv 2110.00641), or with
    `bypass_mode` r = target / behavior and c = 1. `ppo_clip` is -sg(c) min(r A, clip(r) A)
    (arXiv 1707.06347; dual clip, arXiv 1912.09729); `cispo` is -sg(c clip(r)) A l
    (arXiv 2506.13585); `gspo` is `ppo_clip` with the geometric mean of the sequence's r at each of
    its tokens (arXiv 2507.18071). An entropy bonus and a KL term are added token by token.

    A token is kept if the response mask holds it, its ratios (and its entropy, where that counts)
    are finite, and neither correction nor rejection drops it. All other positions influence
    nothing, and their gradients are exactly 0. Raises ValueError where log-probs or entropies that
    the settings need are missing.
    """
    numerator = _correction_numerator(inputs, settings)
    off_policy = log_importance_ratio(
        numerator, inputs.behavior_logprobs, inputs.response_mask, settings.log_ratio_clamp
    )
    weights = correction_weights(settings.correction, off_policy, settings.correction_settings)
    kept = weights.kept & accepted(off_policy, settings.rejections)
    token = _OBJECTIVES[settings.objective](inputs, settings, kept)
    token = _with_regularizers(inputs, settings, token, weights.weights)
    total = aggregate(
        token.losses,
        token.kept,
        inputs.response_mask,
        settings.loss_agg_mode,
        settings.max_response_length,
    )
    sums = {k: masked_sum(v, token.kept, torch.float64) for k, v in token.metrics.items()}
    metrics = off_policy_sums(off_policy, numerator, inputs.behavior_logprobs).merged(
        rejection_sums(
            off_policy, weights, token.kept, settings.correction_settings, token.num_non_finite
        ),
        MetricSums(sums, {"tokens": token.kept.sum()}),
    )
    return LossOutput(
        loss_sum=total.loss_sum,
        denominator=total.denominator,
        metrics=metrics,
        maxima=off_policy_maxima(off_policy),
        log_ratios=off_policy.values[off_policy.kept].detach(),
    )


@dataclass(frozen=True)
class _TokenLosses:
    """Token losses, 0 where not kept, and per-token metrics of the objective."""

    losses: Float[Tensor, "batch seq"]
    kept: Bool[Tensor, "batch seq"]
    num_non_finite: Int64[Tensor, ""]
    """Tokens dropped because something of the objective itself is not finite."""
    metrics: dict[str, Float[Tensor, "batch seq"]]


def _correction_numerator(
    inputs: LossInputs, settings: ObjectiveSettings
) -> Float[Tensor, "batch seq"]:
    """The policy that the correction puts over the behavior policy, without gradient."""
    if not settings.needs_old_logprobs:
        return inputs.target_logprobs.detach()
    if inputs.old_logprobs is None:
        raise ValueError(
            f"decoupled {settings.objective} needs old_logprobs; bypass_mode does without them"
        )
    return inputs.old_logprobs.detach()


def _reinforce(
    inputs: LossInputs, settings: ObjectiveSettings, kept: Bool[Tensor, "batch seq"]
) -> _TokenLosses:
    losses = -_token_advantages(inputs, kept) * fill_masked(inputs.target_logprobs, kept)
    return _TokenLosses(losses, kept, torch.zeros_like(kept.sum()), {})


def _ppo_clip(
    inputs: LossInputs, settings: ObjectiveSettings, kept: Bool[Tensor, "batch seq"]
) -> _TokenLosses:
    log_ratio = _objective_ratio(inputs, settings, kept)
    return _clipped(inputs, settings, log_ratio, log_ratio.values)


def _gspo(
    inputs: LossInputs, settings: ObjectiveSettings, kept: Bool[Tensor, "batch seq"]
) -> _TokenLosses:
    log_ratio = _objective_ratio(inputs, settings, kept)
    # The sequence's value with each token's own gradient: the paper's GSPO-token.
    values = log_ratio.values
    sequence = mean_log_ratio(log_ratio.detach())[:, None] + (values - values.detach())
    return _clipped(inputs, settings, log_ratio, fill_masked(sequence, log_ratio.kept))


def _cispo(
    inputs: LossInputs, settings: ObjectiveSettings, kept: Bool[Tensor, "batch seq"]
) -> _TokenLosses:
    log_ratio = _objective_ratio(inputs, settings, kept).detach()
    kept, ratio = log_ratio.kept, log_ratio.values.exp()
    clipped = _clip(ratio, settings)
    losses = -clipped * _token_advantages(inputs, kept) * fill_masked(inputs.target_logprobs, kept)
    metrics = {
        "actor/ppo_kl": -log_ratio.values,
        "actor/pg_clipfrac": (clipped != ratio).to(ratio.dtype),
    }
    return _TokenLosses(losses, kept, log_ratio.num_non_finite, metrics)


_OBJECTIVES: Mapping[
    str, Callable[[LossInputs, ObjectiveSettings, Bool[Tensor, "batch seq"]], _TokenLosses]
] = {"reinforce": _reinforce, "ppo_clip": _ppo_clip, "cispo": _cispo, "gspo": _gspo}


def _clipped(
    inputs: LossInputs,
    settings: ObjectiveSettings,
    log_ratio: LogRatio,
    values: Float[Tensor, "batch seq"],
) -> _TokenLosses:
    """PPO's pessimistic loss of the ratio exp(values)."""
    ratio, kept = values.exp(), log_ratio.kept
    clipped = _clip(ratio, settings)
    advantages = _token_advantages(inputs, kept)
    plain_losses, clipped_losses = -advantages * ratio, -advantages * clipped
    losses = torch.maximum(plain_losses, clipped_losses)
    metrics = {
        "actor/ppo_kl": -log_ratio.values.detach(),
        "actor/pg_clipfrac": (clipped_losses > plain_losses).to(ratio.dtype),
    }
    if settings.clip_ratio_c is not None:
        bound = -advantages * settings.clip_ratio_c
        is_bounded = (advantages < 0) & (losses > bound)
        losses = torch.where(is_bounded, bound, losses)
        metrics["actor/pg_clipfrac_lower"] = is_bounded.to(ratio.dtype)
    return _TokenLosses(losses, kept, log_ratio.num_non_finite, metrics)


def _with_regularizers(
    inputs: LossInputs,
    settings: ObjectiveSettings,
    token: _TokenLosses,
    weights: Float[Tensor, "batch seq"],
) -> _TokenLosses:
    """Weigh the losses by the correction; add KL term and entropy bonus."""
    kept, num_non_finite, metrics = token.kept, token.num_non_finite, dict(token.metrics)
    losses = fill_masked(weights, kept) * token.losses
    metrics["actor/pg_loss"] = losses.detach()
    if settings.kl_loss_coef != 0:
        kl, kept, dropped = _kl_term(inputs, settings, kept)
        num_non_finite = num_non_finite + dropped
        metrics["actor/kl_loss"] = kl.detach()
        losses = losses + settings.kl_loss_coef * kl
    if inputs.entropy is not None:
        metrics["actor/entropy"] = inputs.entropy.detach()
    if settings.entropy_coeff != 0:
        if inputs.entropy is None:
            raise ValueError("an entropy bonus needs entropy")
        has_entropy = inputs.entropy.isfinite()
        num_non_finite = num_non_finite + (kept & ~has_entropy).sum()
        kept = kept & has_entropy
        losses = losses - settings.entropy_coeff * fill_masked(inputs.entropy, kept)
    return _TokenLosses(losses, kept, num_non_finite, metrics)


def _kl_term(
    inputs: LossInputs, settings: ObjectiveSettings, kept: Bool[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"], Int64[Tensor, ""]]:
    """The KL estimate of each token, the tokens that have one, and how many lost theirs."""
    if inputs.ref_logprobs is None:
        raise ValueError("a KL term needs ref_logprobs")
    clamp = settings.log_ratio_clamp
    log_ratio = log_importance_ratio(
        inputs.ref_logprobs.detach(), inputs.target_logprobs, kept, clamp
    )
    kl = kl_from_reference(log_ratio, settings.kl_loss_type)
    if settings.kl_corrected:
        weight = log_importance_ratio(
            inputs.target_logprobs, inputs.behavior_logprobs.detach(), log_ratio.kept, clamp
        )
        kl = fill_masked(weight.values.exp() * kl, weight.kept)
    return kl, log_ratio.kept, log_ratio.num_non_finite


def _objective_ratio(
    inputs: LossInputs, settings: ObjectiveSettings, kept: Bool[Tensor, "batch seq"]
) -> LogRatio:
    """log(target / old), or log(target / behavior) with `bypass_mode`; differentiable."""
    anchor = inputs.behavior_logprobs if settings.bypass_mode else inputs.old_logprobs
    assert anchor is not None, "_correction_numerator has checked old_logprobs"
    clamp = settings.log_ratio_clamp
    return log_importance_ratio(inputs.target_logprobs, anchor.detach(), kept, clamp)


def _clip(ratio: Float[Tensor, "batch seq"], settings: ObjectiveSettings) -> Tensor:
    return ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)


def _token_advantages(
    inputs: LossInputs, kept: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Each completion's advantage at its kept tokens, 0 elsewhere, without gradient."""
    advantages = inputs.advantages.detach().to(inputs.target_logprobs.dtype)
    return fill_masked(advantages[:, None].expand(kept.shape), kept)
