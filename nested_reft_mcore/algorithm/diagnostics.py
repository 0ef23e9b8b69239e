"""How far the behavior policy is from the target policy, as sums that add over anything.

Micro-batches and replicas each return sums over their own tokens (`off_policy_sums`); they are
added, and divided once, by the global number of tokens (`finalize_metrics`). Maxima are combined
by maximum. A percentile does not add up at all: `ratio_p05` wants all the log-ratios together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.importance import LogRatio
from nested_reft_mcore.algorithm.masking import fill_masked, masked_sum

NUM_NON_FINITE = "nested/num_non_finite_ratios"
"""Tokens dropped for a log-ratio that is not finite: a count, never divided."""
COUNTS = frozenset({NUM_NON_FINITE})
"""Sums that are counts themselves."""


def off_policy_sums(
    log_ratio: LogRatio,
    target_logprobs: Float[Tensor, "batch seq"],
    behavior_logprobs: Float[Tensor, "batch seq"],
) -> dict[str, Float[Tensor, ""]]:
    """Sums over the kept tokens, in float64; divided by their number they are, with r the ratio:

    - `rollout_corr/kl`: behavior minus target log-prob, the plain estimate of
      KL(behavior || target) over behavior samples, in nats; not clamped;
    - `rollout_corr/k3_kl`: r - 1 - log r, the estimate that is never negative (Schulman's k3);
    - `rollout_corr/chi2_token`: r^2 - 1, chi-squared divergence per token;
    - `rollout_corr/rollout_is_mean`: r, whose expectation is 1;
    - `nested/num_non_finite_ratios`: a count.
    """
    kept, values = log_ratio.kept, log_ratio.values.detach().double()
    difference = fill_masked(behavior_logprobs.detach(), kept).double()
    difference = difference - fill_masked(target_logprobs.detach(), kept).double()
    return {
        "rollout_corr/kl": masked_sum(difference, kept),
        "rollout_corr/k3_kl": masked_sum(torch.expm1(values) - values, kept),
        "rollout_corr/chi2_token": masked_sum(torch.expm1(2 * values), kept),
        "rollout_corr/rollout_is_mean": masked_sum(values.exp(), kept),
        NUM_NON_FINITE: log_ratio.num_non_finite.double(),
    }


def off_policy_maxima(log_ratio: LogRatio) -> dict[str, Float[Tensor, ""]]:
    """`rollout_corr/rollout_is_max`: largest ratio of a kept token, 0 where none is; float64."""
    values = log_ratio.values.detach().double()
    ratios = fill_masked(values.exp(), log_ratio.kept)
    largest = ratios.max() if ratios.numel() else ratios.sum()
    return {"rollout_corr/rollout_is_max": largest}


def effective_sample_size(ratio_mean: float, ratio_square_mean: float) -> float:
    """(sum r)^2 / (N sum r^2) in (0, 1]: the share of the tokens that weighting leaves (Kish)."""
    return ratio_mean**2 / ratio_square_mean if ratio_square_mean > 0 else 0.0


def ratio_p05(log_ratios: Float[Tensor, " tokens"], quantile: float = 0.05) -> float:
    """The 5th percentile of min(r, 1/r) over all kept tokens: 1 on-policy, near 0 far off.

    Nearest rank: the smallest value that at least 5% of the tokens do not exceed. `log_ratios` are
    those of every micro-batch and replica, concatenated; NaN where there are none.
    """
    if log_ratios.numel() == 0:
        return math.nan
    # 0.05 * 140 is 7.000000000000001 in floats, and its rank is 7.
    rank = max(1, math.ceil(quantile * log_ratios.numel() - 1e-9))
    return float(torch.kthvalue((-log_ratios.double().abs()).exp(), rank).values)


def finalize_metrics(
    sums: Mapping[str, Float[Tensor, ""] | float],
    num_tokens: Int64[Tensor, ""] | int,
    maxima: Mapping[str, Float[Tensor, ""] | float] | None = None,
) -> dict[str, float]:
    """Metrics of a global batch from the global sums of its `LossOutput.metrics`.

    Every sum but the counts is divided by `num_tokens`, the global number of kept tokens; the
    effective sample size follows from the first two moments of the ratio. Without a token there
    are only counts.
    """
    count = int(num_tokens)
    metrics = {name: float(value) for name, value in sums.items() if name in COUNTS}
    if count == 0:
        return metrics
    metrics |= {name: float(value) / count for name, value in sums.items() if name not in COUNTS}
    metrics |= {name: float(value) for name, value in (maxima or {}).items()}
    if "rollout_corr/rollout_is_mean" in metrics:
        ess = effective_sample_size(
            metrics["rollout_corr/rollout_is_mean"], metrics["rollout_corr/chi2_token"] + 1.0
        )
        metrics["rollout_corr/rollout_is_eff_sample_size"] = ess
        metrics["nested/ess"] = ess
    return metrics
