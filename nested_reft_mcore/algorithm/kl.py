"""Kullback-Leibler divergence from a reference policy, estimated from sampled tokens.

With d = log ref - log target of a sampled token (Schulman, http://joschu.net/blog/kl-approx.html):

- `k1` = -d: unbiased under target samples, negative at times. As a LOSS its gradient is zero in
  expectation: use it in the reward.
- `k2` = d^2 / 2: biased value; its gradient is that of KL(target || ref) under target samples.
- `k3` = exp(d) - 1 - d: unbiased and never negative; its gradient is that of KL(ref || target).

Samples of the behavior policy need a weight: w_t = target / behavior, through which the gradient
flows too, makes value and gradient of `k1` and `k3` those of KL(target || ref) at each visited
state (as DeepSeek-V3.2 does, arXiv 2512.02556).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nested_reft_mcore.algorithm.importance import LogRatio
from nested_reft_mcore.algorithm.masking import fill_masked

KlEstimator = Literal["k1", "k2", "k3"]


def kl_from_reference(
    log_ref_over_target: LogRatio, estimator: KlEstimator
) -> Float[Tensor, "batch seq"]:
    """The estimate of each kept token, in nats, 0 elsewhere; differentiable by the target.

    Raises ValueError for an unknown estimator.
    """
    if estimator not in get_args(KlEstimator):
        raise ValueError(
            f"unknown KL estimator {estimator!r}: choose one of {get_args(KlEstimator)}"
        )
    difference = log_ref_over_target.values
    if estimator == "k1":
        estimate = -difference
    elif estimator == "k2":
        estimate = 0.5 * difference.square()
    else:
        estimate = torch.expm1(difference) - difference
    return fill_masked(estimate, log_ref_over_target.kept)


def sequence_kl(log_ref_over_target: LogRatio, estimator: KlEstimator) -> Float[Tensor, " batch"]:
    """Sum of the estimates of each sequence, in nats, to be taken off its reward."""
    return kl_from_reference(log_ref_over_target, estimator).detach().sum(dim=-1)
