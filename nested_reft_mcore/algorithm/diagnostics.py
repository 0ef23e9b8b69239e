"""How far the behavior policy is from the target policy, as sums that add over anything.

Micro-batches and replicas each return sums beside the counts that divide them (`MetricSums`); both
are added, and divided once (`finalize_metrics`). Maxima are combined by maximum. A percentile does
not add up at all: `ratio_p05` wants all the log-ratios together. `MetricTerms` has the three.

Off-policy statistics are over all response tokens whose ratio is finite, rejected ones included:
what has been rejected is still off-policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.importance import CorrectionSettings, LogRatio, TokenWeights
from nested_reft_mcore.algorithm.masking import fill_masked, masked_sum

NUM_NON_FINITE = "nested/num_non_finite_ratios"
"""Tokens dropped for a log-ratio that is not finite: a count, never divided."""

_DIVISOR: Mapping[str, str] = {
    NUM_NON_FINITE: "none",
    "rollout_corr/kl": "response_tokens",
    "rollout_corr/k3_kl": "response_tokens",
    "rollout_corr/chi2_token": "response_tokens",
    "rollout_corr/rollout_is_mean": "response_tokens",
    "rollout_corr/rollout_is_ratio_fraction_high": "response_tokens",
    "rollout_corr/rollout_is_ratio_fraction_low": "response_tokens",
    "rollout_corr/rollout_rs_masked_fraction": "response_tokens",
    "rollout_corr/rollout_rs_seq_masked_fraction": "sequences",
    "rollout_corr/seq_ratio_mean": "sequences",
    "rollout_corr/chi2_seq": "sequences",
}
"""What divides a sum; those that are not listed are divided by the number of kept tokens."""

Number = Float[Tensor, ""] | Int64[Tensor, ""] | float | int


@dataclass(frozen=True)
class MetricSums:
    """Sums by metric, and the counts that divide them: `tokens` (kept), `response_tokens` (with a
    finite ratio) and `sequences` (with such a token)."""

    sums: Mapping[str, Number]
    counts: Mapping[str, Number]

    def merged(self, *others: MetricSums) -> MetricSums:
        """These and those of the same tokens; sums of one name add up, counts must be the same."""
        sums = dict(self.sums)
        counts = dict(self.counts)
        for other in others:
            for name, value in other.sums.items():
                sums[name] = sums[name] + value if name in sums else value
            counts.update(other.counts)
        return MetricSums(sums, counts)

    def numbers(self) -> MetricSums:
        """The same as Python floats, to be sent to other processes."""
        return MetricSums(
            {name: float(value) for name, value in self.sums.items()},
            {name: float(value) for name, value in self.counts.items()},
        )

    @classmethod
    def total(cls, parts: Iterable[MetricSums]) -> MetricSums:
        """Everything added up, over parts that are about different tokens."""
        sums: dict[str, Number] = {}
        counts: dict[str, Number] = {}
        for part in parts:
            for into, values in ((sums, part.sums), (counts, part.counts)):
                for name, value in values.items():
                    into[name] = into.get(name, 0.0) + value
        return cls(sums, counts)


@dataclass(frozen=True)
class MetricTerms:
    """What metrics are made of, of some tokens; adds over micro-batches, replicas and updates."""

    sums: MetricSums
    maxima: Mapping[str, Number]
    log_ratios: Float[Tensor, " tokens"]
    """Of the response tokens with a finite ratio."""

    def on_host(self) -> MetricTerms:
        """The same as Python floats and a tensor on the CPU, to be sent to other processes."""
        maxima = {name: float(value) for name, value in self.maxima.items()}
        return MetricTerms(self.sums.numbers(), maxima, self.log_ratios.cpu())

    @classmethod
    def total(cls, parts: Sequence[MetricTerms]) -> MetricTerms:
        """Of all tokens of the parts, at least one."""
        maxima: dict[str, Number] = {}
        for part in parts:
            for name, value in part.maxima.items():
                maxima[name] = max(maxima.get(name, value), value)
        return cls(
            MetricSums.total(part.sums for part in parts),
            maxima,
            torch.cat([part.log_ratios for part in parts]),
        )

    def metrics(self) -> dict[str, float]:
        """Those of `finalize_metrics`, and `nested/ratio_p05`."""
        finished = finalize_metrics(self.sums, self.maxima)
        return finished | {"nested/ratio_p05": ratio_p05(self.log_ratios)}


def off_policy_sums(
    log_ratio: LogRatio,
    target_logprobs: Float[Tensor, "batch seq"],
    behavior_logprobs: Float[Tensor, "batch seq"],
) -> MetricSums:
    """Sums in float64; divided by their counts they are, with r a token's ratio and R a sequence's:

    - `rollout_corr/kl`: behavior minus target log-prob, the plain estimate of
      KL(behavior || target) over behavior samples, in nats; not clamped;
    - `rollout_corr/k3_kl`: r - 1 - log r, the estimate that is never negative (Schulman's k3);
    - `rollout_corr/chi2_token`: r^2 - 1, chi-squared divergence per token;
    - `rollout_corr/chi2_seq`, `rollout_corr/seq_ratio_mean`: R^2 - 1 and R, with R = prod r;
    - `rollout_corr/rollout_is_mean`: r, whose expectation is 1;
    - `nested/num_non_finite_ratios`: a count.
    """
    kept, values = log_ratio.kept, log_ratio.values.detach().double()
    difference = fill_masked(behavior_logprobs.detach(), kept).double()
    difference = difference - fill_masked(target_logprobs.detach(), kept).double()
    has_tokens = kept.any(dim=-1)
    sequence = values.sum(dim=-1).clamp(-_MAX_SEQUENCE_LOG_RATIO, _MAX_SEQUENCE_LOG_RATIO)
    sums = {
        "rollout_corr/kl": masked_sum(difference, kept),
        "rollout_corr/k3_kl": masked_sum(torch.expm1(values) - values, kept),
        "rollout_corr/chi2_token": masked_sum(torch.expm1(2 * values), kept),
        "rollout_corr/rollout_is_mean": masked_sum(values.exp(), kept),
        "rollout_corr/chi2_seq": masked_sum(torch.expm1(2 * sequence), has_tokens),
        "rollout_corr/seq_ratio_mean": masked_sum(sequence.exp(), has_tokens),
        NUM_NON_FINITE: log_ratio.num_non_finite.double(),
    }
    return MetricSums(sums, {"response_tokens": kept.sum(), "sequences": has_tokens.sum()})


def rejection_sums(
    log_ratio: LogRatio,
    weights: TokenWeights,
    kept: Bool[Tensor, "batch seq"],
    settings: CorrectionSettings,
    num_non_finite: Int64[Tensor, ""],
) -> MetricSums:
    """What correction and rejection did, `kept` being what the loss counts in the end:

    - `rollout_corr/rollout_is_ratio_fraction_high`, `_low`: response tokens outside the
      correction's bounds;
    - `rollout_corr/rollout_rs_masked_fraction`, `rollout_rs_seq_masked_fraction`: response tokens
      that do not count, and sequences that have one;
    - `rollout_corr/weight_mean`: weight of a kept token;
    - `nested/num_non_finite_ratios`: tokens that the objective dropped.
    """
    finite, ratio = log_ratio.kept, log_ratio.values.detach().double().exp()
    rejected = finite & ~kept
    return MetricSums(
        {
            "rollout_corr/rollout_is_ratio_fraction_high": (
                finite & (ratio > settings.upper)
            ).sum(),
            "rollout_corr/rollout_is_ratio_fraction_low": (finite & (ratio < settings.lower)).sum(),
            "rollout_corr/rollout_rs_masked_fraction": rejected.sum(),
            "rollout_corr/rollout_rs_seq_masked_fraction": rejected.any(dim=-1).sum(),
            "rollout_corr/weight_mean": masked_sum(weights.weights, kept, torch.float64),
            NUM_NON_FINITE: num_non_finite.double(),
        },
        {},
    )


def off_policy_maxima(log_ratio: LogRatio) -> dict[str, Float[Tensor, ""]]:
    """`rollout_corr/rollout_is_max`: largest ratio of a kept token, 0 where none is; float64."""
    values = log_ratio.values.detach().double()
    ratios = fill_masked(values.exp(), log_ratio.kept)
    largest = ratios.max() if ratios.numel() else ratios.sum()
    return {"rollout_corr/rollout_is_max": largest}


def effective_sample_size(ratio_mean: float, ratio_square_mean: float) -> float:
    """(sum r)^2 / (N sum r^2) in (0, 1]: the share of the samples that weighting leaves (Kish)."""
    return ratio_mean**2 / ratio_square_mean if ratio_square_mean > 0 else 0.0


def ratio_p05(log_ratios: Float[Tensor, " tokens"], quantile: float = 0.05) -> float:
    """The 5th percentile of min(r, 1/r) over all response tokens: 1 on-policy, near 0 far off.

    Nearest rank: the smallest value that at least 5% of the tokens do not exceed. `log_ratios` are
    those of every micro-batch and replica, concatenated; NaN where there are none.
    """
    if log_ratios.numel() == 0:
        return math.nan
    # 0.05 * 140 is 7.000000000000001 in floats, and its rank is 7.
    rank = max(1, math.ceil(quantile * log_ratios.numel() - 1e-9))
    return float(torch.kthvalue((-log_ratios.double().abs()).exp(), rank).values)


def finalize_metrics(
    total: MetricSums, maxima: Mapping[str, Number] | None = None
) -> dict[str, float]:
    """Metrics of a global batch from the global sums and counts of its `LossOutput.metrics`.

    The effective sample sizes follow from the first two moments of the ratios: `nested/ess` per
    token, `nested/ess_seq` per sequence. What has a count of 0 is left out.
    """
    metrics: dict[str, float] = {}
    for name, value in total.sums.items():
        divisor = _DIVISOR.get(name, "tokens")
        count = 1.0 if divisor == "none" else float(total.counts.get(divisor, 0))
        if count:
            metrics[name] = float(value) / count
    for names, mean, chi2 in _EFFECTIVE_SAMPLE_SIZES:
        if mean in metrics:
            ess = effective_sample_size(metrics[mean], metrics[chi2] + 1.0)
            metrics |= dict.fromkeys(names, ess)
    if total.counts.get("response_tokens"):
        metrics |= {name: float(value) for name, value in (maxima or {}).items()}
    return metrics


_MAX_SEQUENCE_LOG_RATIO = 300.0
"""Nats; the square of its exponential is still finite in float64."""

_EFFECTIVE_SAMPLE_SIZES = (
    (
        ("nested/ess", "rollout_corr/rollout_is_eff_sample_size"),
        "rollout_corr/rollout_is_mean",
        "rollout_corr/chi2_token",
    ),
    (("nested/ess_seq",), "rollout_corr/seq_ratio_mean", "rollout_corr/chi2_seq"),
)
