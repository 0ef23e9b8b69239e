"""Rejection: tokens or sequences that are too far off-policy count for nothing.

The criteria and their names are verl's (`rollout_rs`), built on the estimators of
KL(behavior || target) of Schulman, http://joschu.net/blog/kl-approx.html, with
r = target / behavior: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r.
Rejected tokens leave the denominator too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nested_reft_mcore.algorithm.importance import LogRatio
from nested_reft_mcore.algorithm.masking import fill_masked

REJECTIONS = (
    *(f"token_k{i}" for i in (1, 2, 3)),
    *(f"seq_sum_k{i}" for i in (1, 2, 3)),
    *(f"seq_mean_k{i}" for i in (1, 2, 3)),
    *(f"seq_max_k{i}" for i in (2, 3)),
)
"""Names of criteria: over what the estimator is taken, and which estimator."""


@dataclass(frozen=True)
class RejectionRule:
    """Keep what lies between two bounds; ValueError for an unknown name or impossible bounds."""

    name: str
    """One of `REJECTIONS`."""
    upper: float
    """k2 and k3: the largest that is kept, in nats. k1: as a ratio, exp(k1) <= upper."""
    lower: float | None = None
    """k1 only: exp(k1) >= lower; left out, 1 / upper."""

    def __post_init__(self) -> None:
        if self.name not in REJECTIONS:
            raise ValueError(f"unknown rejection {self.name!r}: choose one of {REJECTIONS}")
        if self.lower is not None and not self.name.endswith("k1"):
            raise ValueError(f"{self.name} is never negative: it has an upper bound only")
        if not self.upper > 0:
            raise ValueError(f"{self.name} wants an upper bound above 0, got {self.upper}")
        if self.name.endswith("k1"):
            lower = 1.0 / self.upper if self.lower is None else self.lower
            if not 0 < lower <= self.upper:
                raise ValueError(
                    f"{self.name} keeps what lies between 0 < lower <= upper (lower left out: "
                    f"1 / upper), got {self.lower} and {self.upper}"
                )


def accepted(log_ratio: LogRatio, rules: Sequence[RejectionRule]) -> Bool[Tensor, "batch seq"]:
    """The kept tokens that pass every rule.

    `token_*` judges each token, `seq_sum_*`, `seq_mean_*` and `seq_max_*` a whole sequence by the
    sum, mean or maximum over its kept tokens.
    """
    values, kept = log_ratio.values.detach(), log_ratio.kept
    passes = kept
    for rule in rules:
        level, _, estimator = rule.name.rpartition("_")
        statistic = fill_masked(_ESTIMATORS[estimator](values), kept)
        if level == "seq_max":
            statistic = statistic.amax(dim=-1, keepdim=True)
        elif level != "token":
            statistic = statistic.sum(dim=-1, keepdim=True)
        if level == "seq_mean":
            statistic = statistic / kept.sum(dim=-1, keepdim=True).clamp(min=1)
        low, high = -math.inf, rule.upper
        if estimator == "k1":
            lower = 1.0 / rule.upper if rule.lower is None else rule.lower
            low, high = math.log(lower), math.log(rule.upper)
        passes = passes & (statistic >= low) & (statistic <= high)
    return passes


_Estimator = Callable[[Float[Tensor, "batch seq"]], Float[Tensor, "batch seq"]]
_ESTIMATORS: Mapping[str, _Estimator] = {
    "k1": torch.neg,
    "k2": lambda log_r: 0.5 * log_r.square(),
    "k3": lambda log_r: torch.expm1(log_r) - log_r,
}
