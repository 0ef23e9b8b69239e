"""Importance ratios between two policies, and the corrections made of them.

With w_t = target / behavior of the t-th sampled token, a correction turns the ratios of a sequence
into the weights of its tokens. Only `trajectory`, the untruncated product over the whole sequence,
is unbiased; docs/algorithm.md has the formulas, their sources, and what each one's bias is.
`practical`, `base` and `retrace` are the variants of Nested-ReFT (arXiv 2508.10123), as we read it.
"""

from __future__ import annotations

import math
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
    mask: Bool[Tensor, "batch seq"]
    """Positions that were asked for."""

    @property
    def num_non_finite(self) -> Int64[Tensor, ""]:
        """Positions of the mask that were dropped because their log-ratio is not finite."""
        return (self.mask & ~self.kept).sum()

    def detach(self) -> LogRatio:
        """The same without gradient."""
        return LogRatio(self.values.detach(), self.kept, self.mask)


@dataclass(frozen=True)
class TokenWeights:
    """What a correction makes of the ratios; carries no gradient."""

    weights: Float[Tensor, "batch seq"]
    """Factor of each token's loss; 0 where not kept."""
    kept: Bool[Tensor, "batch seq"]
    """Tokens that count, in the loss and in its denominator."""


@dataclass(frozen=True)
class CorrectionSettings:
    """Parameters of the corrections; each reads its own. ValueError for impossible ones."""

    retrace_lambda: float = 1.0
    """`retrace`, `retrace_cumulative`: the lambda of Munos et al."""
    lower: float = 0.0
    """`icepop`: tokens whose ratio is below are rejected."""
    upper: float = math.inf
    """Largest weight; `icepop` rejects tokens whose ratio is above."""
    log_clamp: float = 20.0
    """Nats: log-weights that are sums over a sequence are cut to this magnitude."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.retrace_lambda <= 1.0:
            raise ValueError(f"retrace_lambda lies between 0 and 1, got {self.retrace_lambda}")
        if not 0.0 <= self.lower < self.upper:
            raise ValueError(
                f"the bounds of a ratio are 0 <= lower < upper, got {self.lower} and {self.upper}"
            )
        _check_clamp(self.log_clamp)


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
    _check_clamp(clamp)
    difference = numerator_logprobs.detach() - denominator_logprobs.detach()
    kept = mask & torch.isfinite(difference)
    # Filled before the arithmetic: no NaN is ever multiplied by the zero of a dropped position.
    values = fill_masked(numerator_logprobs, kept) - fill_masked(denominator_logprobs, kept)
    return LogRatio(values.clamp(-clamp, clamp), kept, mask)


def correction_weights(
    name: str, log_ratio: LogRatio, settings: CorrectionSettings | None = None
) -> TokenWeights:
    """Weights of the correction called `name`, without gradient.

    Raises ValueError for a name that is not in `CORRECTIONS`.
    """
    if name not in CORRECTIONS:
        raise ValueError(f"unknown correction {name!r}: choose one of {', '.join(CORRECTIONS)}")
    return CORRECTIONS[name](log_ratio.detach(), settings or CorrectionSettings())


def practical(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight 1: rollouts are treated as if they were on-policy."""
    return TokenWeights(log_ratio.kept.to(log_ratio.values.dtype), log_ratio.kept)


def base(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight w_t = target / behavior of the token itself."""
    return _weights(log_ratio.values, log_ratio.kept)


def retrace(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight lambda * min(1, w_t): the trace of Retrace (arXiv 1606.02647), token by token."""
    traces = settings.retrace_lambda * log_ratio.values.clamp(max=0.0).exp()
    return TokenWeights(fill_masked(traces, log_ratio.kept), log_ratio.kept)


def retrace_cumulative(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight prod_{s<=t} lambda * min(1, w_s): Retrace's product of traces (arXiv 1606.02647).

    Tokens behind one whose ratio is not finite are rejected: the product is not known there.
    """
    kept = log_ratio.kept & _unbroken_so_far(log_ratio)
    discount = settings.retrace_lambda ** kept.cumsum(dim=-1).to(log_ratio.values.dtype)
    traces = log_ratio.values.clamp(max=0.0).cumsum(dim=-1).exp()
    return TokenWeights(fill_masked(discount * traces, kept), kept)


def trajectory(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight min(prod_s w_s, upper) over the whole sequence: unbiased while `upper` is infinite.

    A sequence with a ratio that is not finite is rejected whole.
    """
    kept = log_ratio.kept & _is_whole(log_ratio)
    return _weights(_sequence_log_ratio(log_ratio, settings), kept, settings.upper)


def prefix(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight min(prod_{s<=t} w_s, upper), the ratio of the sequence up to and with the token.

    The return behind t still follows the behavior policy, so with a reward for the outcome this is
    the gradient with the behavior policy's action values. Tokens behind a ratio that is not finite
    are rejected.
    """
    kept = log_ratio.kept & _unbroken_so_far(log_ratio)
    product = log_ratio.values.cumsum(dim=-1).clamp(-settings.log_clamp, settings.log_clamp)
    return _weights(product, kept, settings.upper)


def tis(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight min(w_t, upper): truncated importance sampling, token by token."""
    return _weights(log_ratio.values, log_ratio.kept, settings.upper)


def icepop(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight w_t for lower <= w_t <= upper; other tokens are rejected, denominator included."""
    ratio = log_ratio.values.exp()
    kept = log_ratio.kept & (ratio >= settings.lower) & (ratio <= settings.upper)
    return TokenWeights(fill_masked(ratio, kept), kept)


def geometric(log_ratio: LogRatio, settings: CorrectionSettings, /) -> TokenWeights:
    """Weight min((prod_s w_s)^(1/T), upper): the sequence ratio of GSPO (arXiv 2507.18071).

    A sequence with a ratio that is not finite is rejected whole.
    """
    kept = log_ratio.kept & _is_whole(log_ratio)
    return _weights(mean_log_ratio(log_ratio)[:, None].expand(kept.shape), kept, settings.upper)


def mean_log_ratio(log_ratio: LogRatio) -> Float[Tensor, " batch"]:
    """Mean of each sequence's kept log-ratios, in nats; 0 for a sequence without any."""
    count = log_ratio.kept.sum(dim=-1).clamp(min=1)
    return fill_masked(log_ratio.values, log_ratio.kept).sum(dim=-1) / count


CORRECTIONS: Mapping[str, Correction] = {
    "practical": practical,
    "base": base,
    "retrace": retrace,
    "retrace_cumulative": retrace_cumulative,
    "trajectory": trajectory,
    "prefix": prefix,
    "tis": tis,
    "icepop": icepop,
    "geometric": geometric,
}
"""Corrections by the name that the configuration gives them."""


def _weights(
    log_weights: Float[Tensor, "batch seq"],
    kept: Bool[Tensor, "batch seq"],
    upper: float = math.inf,
) -> TokenWeights:
    return TokenWeights(fill_masked(log_weights.exp().clamp(max=upper), kept), kept)


def _sequence_log_ratio(
    log_ratio: LogRatio, settings: CorrectionSettings
) -> Float[Tensor, "batch seq"]:
    """Sum of each sequence's log-ratios, cut to the clamp, at every position."""
    total = log_ratio.values.sum(dim=-1, keepdim=True)
    return total.clamp(-settings.log_clamp, settings.log_clamp).expand(log_ratio.values.shape)


def _is_whole(log_ratio: LogRatio) -> Bool[Tensor, "batch 1"]:
    """Whether no ratio of the sequence had to be dropped."""
    return ~(log_ratio.mask & ~log_ratio.kept).any(dim=-1, keepdim=True)


def _unbroken_so_far(log_ratio: LogRatio) -> Bool[Tensor, "batch seq"]:
    """Whether no ratio of the sequence up to here had to be dropped."""
    return (log_ratio.mask & ~log_ratio.kept).cumsum(dim=-1) == 0


def _check_clamp(clamp: float) -> None:
    if not 0 < clamp <= MAX_LOG_RATIO_CLAMP:
        raise ValueError(
            f"the clamp of log-ratios lies between 0 and {MAX_LOG_RATIO_CLAMP} nats, so that the "
            f"ratio stays finite in float32, got {clamp}"
        )
