"""Means over seeds, with intervals by Student's t where there are three and more."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half: float | None
    """Half of its 95% interval; of two values, half their distance; None where there is one."""
    count: int
    """Seeds."""


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean and Student's t interval of independent values; ValueError where there is none.

    Two values have an interval thirteen standard errors wide either way, which says nothing: their
    distance stands instead.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, 1)
    if count == 2:
        return Estimate(mean, abs(values[1] - values[0]) / 2, 2)
    error = statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, t_quantile((1 + level) / 2, count - 1) * error, count)


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t with `degrees` >= 1 degrees of freedom, to about 1e-9.

    ValueError unless 0.5 <= probability < 1.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"probability {probability}, degrees {degrees}: out of range")
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_cdf(value: float, degrees: int) -> float:
    """P(T <= value) for value >= 0, by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    With theta = atan(value / sqrt(degrees)), A = P(|T| <= value) is a polynomial in cos(theta).
    """
    theta = math.atan(value / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    if degrees % 2:
        terms, term = 0.0, cosine
        for k in range(3, degrees + 1, 2):
            terms += term
            term *= cosine**2 * (k - 1) / k
        share = 2 / math.pi * (theta + sine * terms)
    else:
        terms, term = 0.0, 1.0
        for k in range(2, degrees + 1, 2):
            terms += term
            term *= cosine**2 * (k - 1) / k
        share = sine * terms
    return (1 + share) / 2
