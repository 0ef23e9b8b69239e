"""Batches of several groups of completions, exactly: statistics of the batch, groups that drop out.

Advantages hang on rewards alone, and a REINFORCE gradient is linear in them. So a batch is told by
the rewards in it: which completions have them enters through the mean gradient of each reward and
its mean square. Rewards take few values, and groups, and completions within one, may change places.
That leaves some hundred kinds of batches where there are billions of batches.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import (
    AdvantageMethod,
    equal_groups,
    group_relative_advantages,
)
from nested_reft_mcore.algorithm.objectives import ObjectiveSettings
from nested_reft_mcore.analysis.exact_gradients import (
    Moments,
    Sampling,
    scattered,
    squared_lengths,
    token_gradients,
)


@dataclass(frozen=True)
class GroupBatch:
    """A step's global batch: groups of completions of one prompt."""

    method: AdvantageMethod
    group_size: int
    num_groups: int
    max_refills: int | None = None
    """As `filter_groups` does: groups with equal rewards are replaced, in at most so many further
    generations of `num_groups` groups; those that cannot be are masked. None: all groups count."""


def group_batch_moments(
    sampling: Sampling,
    settings: ObjectiveSettings,
    batch: GroupBatch,
    rewards: Tensor,
    gram: Tensor,
) -> Moments:
    """Moments of the gradient of a batch of groups; a batch that nothing is left of has gradient 0.

    Args:
        sampling: who draws.
        settings: `reinforce` over `seq-mean-token-sum-norm`, with any correction and rejection.
        batch: advantages and groups.
        rewards: `[sequences]`.
        gram: `[entries, entries]` inner products of the score functions.

    Raises:
        ValueError: another objective or denominator, whose gradient is not linear in advantages
            or not over the completions that count.
    """
    if (settings.objective, settings.loss_agg_mode) != ("reinforce", "seq-mean-token-sum-norm"):
        raise ValueError(
            "batches of groups want reinforce over seq-mean-token-sum-norm, got "
            f"{settings.objective} over {settings.loss_agg_mode}"
        )
    by_reward = _ByReward.make(sampling, settings, rewards, gram)
    mean, second = torch.zeros(len(gram), dtype=gram.dtype), 0.0
    for num_groups, chance in _group_counts(batch, by_reward):
        kinds = _kinds(batch, num_groups, tuple(by_reward.values.tolist()))
        part = by_reward.moments(kinds, num_groups * batch.group_size)
        mean, second = mean + chance * part.mean, second + chance * part.second
    return Moments(mean, second)


@dataclass(frozen=True)
class _Kind:
    """Batches that differ in the order of groups, or of completions in a group, only."""

    counts: Tensor
    """`[rewards]` int64: completions of each reward."""
    orders: float
    """How many batches there are of the kind."""
    advantages: Tensor
    """`[rewards]`: sum over the completions of each reward."""
    squares: Tensor
    """`[rewards]`: sum of squares over them."""


@dataclass(frozen=True)
class _ByReward:
    """Everything about completions that moments hang on, by their reward."""

    values: Tensor
    """`[rewards]`: the different ones that are drawn."""
    chances: Tensor
    """`[rewards]`, adding up to 1."""
    gradients: Tensor
    """`[rewards, entries]`: mean gradient of a completion of advantage 1."""
    squares: Tensor
    """`[rewards]`: mean of its squared length."""
    products: Tensor
    """`[rewards, rewards]`: inner products of `gradients`."""

    @classmethod
    def make(
        cls, sampling: Sampling, settings: ObjectiveSettings, rewards: Tensor, gram: Tensor
    ) -> _ByReward:
        space, drawn = sampling.space, sampling.probabilities
        single = token_gradients(sampling, settings, torch.ones_like(drawn))
        single = torch.where((drawn > 0)[:, None], single, 0.0)
        lengths = squared_lengths(single, space.entries, gram)
        values = rewards[drawn > 0].unique()
        shares = torch.stack([drawn * (rewards == value) for value in values])
        chances = shares.sum(dim=1)
        shares = shares / chances[:, None]
        gradients = torch.stack(
            [scattered(space, single * share[:, None], space.entries) for share in shares]
        )
        products = gradients @ gram @ gradients.T
        return cls(values, chances / chances.sum(), gradients, shares @ lengths, products)

    def moments(self, kinds: Sequence[_Kind], num_completions: int) -> Moments:
        """Over batches of these kinds, whose chances are made to add up to 1."""
        counts = torch.stack([kind.counts for kind in kinds])
        chances = torch.tensor([kind.orders for kind in kinds], dtype=self.values.dtype)
        chances = chances * (self.chances**counts).prod(dim=1)
        chances = chances / chances.sum()
        sums = torch.stack([kind.advantages for kind in kinds])
        squares = torch.stack([kind.squares for kind in kinds])
        # Two completions are independent given their rewards; one with itself is not.
        own = squares @ (self.squares - self.products.diagonal())
        pairs = torch.einsum("kr,rs,ks->k", sums, self.products, sums)
        mean = chances @ sums @ self.gradients / num_completions
        return Moments(mean, float(chances @ (own + pairs)) / num_completions**2)


def _group_counts(batch: GroupBatch, by_reward: _ByReward) -> list[tuple[int, float]]:
    """How many groups count, at least one, and how likely that is.

    Which groups teach tells nothing about what is in them, so those that are taken are independent
    draws of groups that teach, whenever generation has stopped.
    """
    if batch.max_refills is None:
        return [(batch.num_groups, 1.0)]
    teaches = 1.0 - float((by_reward.chances**batch.group_size).sum())
    if len(by_reward.values) == 1:
        return []
    trials = batch.num_groups * (batch.max_refills + 1)
    fewer = [
        math.comb(trials, n) * teaches**n * (1.0 - teaches) ** (trials - n)
        for n in range(batch.num_groups)
    ]
    counts = list(enumerate([*fewer, 1.0 - math.fsum(fewer)]))
    return [(n, chance) for n, chance in counts[1:] if chance > 0]


@lru_cache(maxsize=64)
def _kinds(batch: GroupBatch, num_groups: int, values: tuple[float, ...]) -> tuple[_Kind, ...]:
    """All kinds of batches of `num_groups` groups, of those that teach where others are filtered.

    The same for every policy that draws these rewards, hence kept.
    """
    size, rewards = batch.group_size, torch.tensor(values, dtype=torch.float64)
    groups = [
        group
        for group in itertools.combinations_with_replacement(range(len(values)), size)
        if batch.max_refills is None or not bool(equal_groups(rewards[list(group)], size).all())
    ]
    return tuple(
        _kind(batch, chosen, rewards)
        for chosen in itertools.combinations_with_replacement(groups, num_groups)
    )


def _kind(batch: GroupBatch, groups: Sequence[tuple[int, ...]], values: Tensor) -> _Kind:
    places = torch.tensor(list(itertools.chain.from_iterable(groups)))
    advantages = group_relative_advantages(
        values[places], batch.method, group_size=batch.group_size
    )
    zeros = torch.zeros_like(values)
    return _Kind(
        torch.bincount(places, minlength=len(values)),
        _orders(groups) * math.prod(_orders(group) for group in groups),
        zeros.index_add(0, places, advantages),
        zeros.index_add(0, places, advantages.square()),
    )


def _orders(things: Sequence[object]) -> float:
    """In how many different orders they can stand."""
    same = math.prod(math.factorial(n) for n in Counter(things).values())
    return math.factorial(len(things)) / same
