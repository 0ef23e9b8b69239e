"""Which data set of a weighted mixture each place of the stream belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nested_reft_mcore.algorithm.counter_random import Stream, shuffled
from nested_reft_mcore.config.errors import UserError

BLOCK = 1000
"""Places in which every data set has its exact quota, in an order of their own."""


class Mixture:
    """Deals the places of an endless stream to data sets: a pure function of (seed, place).

    Every block of 1,000 places holds the same number of each data set, its weight rounded to a
    thousandth; the order within a block is drawn by (seed, block). So the count of a data set's
    places before any place is known without walking there, and a share is off by half a
    thousandth at most.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], seed: int) -> None:
        """UserError for a weight below a thousandth of the sum, and for weights beyond floats."""
        self.quotas = _quotas(names, weights)
        self._seed = seed
        self._block: tuple[int, list[int], list[int]] | None = None

    def locate(self, place: int) -> tuple[int, int]:
        """The data set at a place, and how many of its places come before."""
        block, offset = divmod(place, BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._deal(block))
        _, parts, before = self._block
        part = parts[offset]
        return part, block * self.quotas[part] + before[offset]

    def _deal(self, block: int) -> tuple[list[int], list[int]]:
        """The block's data sets in order, and how many of the same come before each in it."""
        whole = [part for part, quota in enumerate(self.quotas) for _ in range(quota)]
        parts = shuffled(whole, Stream.MIXTURE, self._seed, block)
        seen = [0] * len(self.quotas)
        before = []
        for part in parts:
            before.append(seen[part])
            seen[part] += 1
        return parts, before


def _quotas(names: Sequence[str], weights: Sequence[float]) -> tuple[int, ...]:
    """Places of each data set in a block, by largest remainders."""
    if not math.isfinite(BLOCK * sum(weights)):
        raise UserError(
            f"data.train: the weights {', '.join(f'{weight:g}' for weight in weights)} are too "
            "large to add up; only their ratios matter: expected smaller ones"
        )
    exact = [weight * BLOCK / sum(weights) for weight in weights]
    for name, share in zip(names, exact, strict=True):
        if share < 1:
            raise UserError(
                f"data.train: the weight of {name} is below a thousandth of the sum; expected "
                "larger ones only"
            )
    quotas = [int(share) for share in exact]
    remainders = sorted(range(len(exact)), key=lambda part: (quotas[part] - exact[part], part))
    for part in remainders[: BLOCK - sum(quotas)]:
        quotas[part] += 1
    return tuple(quotas)
