"""Distributions by definition, and the test that draws follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from nested_reft_mcore.algorithm import counter_random
from nested_reft_mcore.rollout.types import SamplingParams


def truncated(logits: Tensor, params: SamplingParams) -> Tensor:
    """`[vocab]` float64: walk down the distinct logits until there is enough."""
    scaled = logits / params.temperature
    if params.greedy:
        return (scaled == scaled.max()).cumsum(0).eq(1).double() * (scaled == scaled.max())
    weights = (scaled - scaled.max()).exp().double()
    if params.top_k is not None:
        weights = _keep_enough(scaled, weights, torch.ones_like(weights), params.top_k)
    if params.top_p is not None:
        weights = _keep_enough(scaled, weights, weights / weights.sum(), params.top_p)
    return weights / weights.sum()


def _keep_enough(scaled: Tensor, weights: Tensor, measure: Tensor, needed: float) -> Tensor:
    """The weights of the largest logits whose measure is at least `needed`; zero elsewhere."""
    for value in scaled.unique().flip(0):
        if measure[scaled >= value].sum() >= needed:
            return torch.where(scaled >= value, weights, 0.0)
    return weights


def numbers(num: int, *keys: int) -> Tensor:
    """`[num]` float64 in (0, 1), others for other keys."""
    return counter_random.uniforms(1234, *keys, torch.arange(num))


def assert_drawn_from(tokens: Tensor, law: Tensor) -> None:
    """Pearson's chi-square of `[n]` tokens against a `[vocab]` law: 6 deviations are allowed.

    Tokens that are expected less than 10 times count together; one of probability 0 may not occur.
    """
    counts = torch.bincount(tokens, minlength=len(law)).double()
    assert len(counts) == len(law), "an id beyond the vocabulary"
    assert not counts[law == 0].any(), "a token of probability zero"
    expected = law * len(tokens)
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = float(((counts - expected) ** 2 / expected.clamp(min=1)).sum())
    freedom = max(len(expected) - 1, 1)
    # Wilson and Hilferty: the cube root of a chi-square is nearly normal.
    bound = freedom * (1 - 2 / (9 * freedom) + 6 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"
