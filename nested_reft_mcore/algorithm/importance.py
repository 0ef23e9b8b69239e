"""Importance ratios between two policies, and the corrections made of them.

The three corrections here are the bias-mitigation variants of Nested-ReFT (arXiv 2508.10123) as we
read them; docs/algorithm.md says how sure that reading is. None of them is the product over the
trajectory, hence none is unbiased for sequences of more than one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.masking import fill_masked

MAX_LOG_RATIO_CLAMP = 80.0
"""Nats; float32 overflows at exp(88.7), and the ratio is multiplied on."""


@dataclass(frozen=True)
class LogRatio:
    """log(numerator / denominator) of the sampled tokens, safe to exponentiate."""

    values: Float[Tensor, "batch seq"]
    """Clamped, in nats; 0 where not kept."""
    kept: Bool[Tensor, "batch seq"]
    """Positions of the mask whose log-ratio is finite."""
    num_non_finite: Int64[Tensor, ""]
    """Positions of the mask that were dropped because theirs is not."""


@dataclass(frozen=True)
class TokenWeights:
    """What a correction makes of the ratios; carries no gradient."""

    weights: Float[Tensor, "batch seq"]
    """Factor of each token's loss; 0 where not kept."""
    kept: Bool[Tensor, "batch seq"]
    """Tokens that count, in the loss and in its denominator."""


@dataclass(frozen=True)
class CorrectionSettings:
    """Parameters of the corrections; each reads its own."""

    retrace_lambda: float = 1.0
    """`retrace`: the lambda of Munos et al."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.retrace_lambda <= 1.0:
            raise ValueError(f"retrace_lambda lies between 0 and 1, got {self.retrace_lambda}")


class Correction(Protocol):
    """Maps log(target / behavior), clamped and 0 outside `kept`, to the weights of the tokens."""

    def __call__(self, log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
        """Weights for each kept token; may keep fewer tokens, never more."""
        ...


def log_importance_ratio(
    numerator_logprobs: Float[Tensor, "batch seq"],
    denominator_logprobs: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clamp: float,
) -> LogRatio:
    """Log-probability under one policy minus that under another, where `mask` is true.

    Values beyond `clamp` nats are cut to it, which bounds the ratio by exp(clamp); the gradient
    there is zero. A masked position whose difference is NaN or infinite is dropped and counted,
    so that it reaches neither loss nor gradient.
    """
    if not 0 < clamp <= MAX_LOG_RATIO_CLAMP:
        raise ValueError(
            f"the clamp of log-ratios lies between 0 and {MAX_LOG_RATIO_CLAMP} nats, so that the "
            f"ratio stays finite in float32, got {clamp}"
        )
    difference = numerator_logprobs.detach() - denominator_logprobs.detach()
    kept = mask & torch.isfinite(difference)
    # Filled before the arithmetic: no NaN is ever multiplied by the zero of a dropped position.
    values = fill_masked(numerator_logprobs, kept) - fill_masked(denominator_logprobs, kept)
    return LogRatio(values.clamp(-clamp, clamp), kept, (mask & ~kept).sum())


def correction_weights(
    name: str, log_ratio: LogRatio, settings: CorrectionSettings | None = None
) -> TokenWeights:
    """Weights of the correction called `name`, without gradient.

    Raises ValueError for a name that is not in `CORRECTIONS`.
    """
    if name not in CORRECTIONS:
        raise ValueError(f"unknown correction {name!r}: choose one of {', '.join(CORRECTIONS)}")
    detached = LogRatio(log_ratio.values.detach(), log_ratio.kept, log_ratio.num_non_finite)
    return CORRECTIONS[name](detached, settings or CorrectionSettings())


def practical(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight 1: rollouts are treated as if they were on-policy."""
    return TokenWeights(log_ratio.kept.to(log_ratio.values.dtype), log_ratio.kept)


def base(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight w_t = target / behavior of the token itself."""
    return TokenWeights(fill_masked(log_ratio.values.exp(), log_ratio.kept), log_ratio.kept)


def retrace(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight lambda * min(1, w_t): the trace of Retrace (arXiv 1606.02647), token by token."""
    traces = settings.retrace_lambda * log_ratio.values.clamp(max=0.0).exp()
    return TokenWeights(fill_masked(traces, log_ratio.kept), log_ratio.kept)


CORRECTIONS: Mapping[str, Correction] = {"practical": practical, "base": base, "retrace": retrace}
"""Corrections by the name that the configuration gives them."""
