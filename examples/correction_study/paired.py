"""Means and confidence intervals of paired differences between the arms of a study."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean of paired differences and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is established at the interval's level."""
        return self.low > 0 or self.high < 0


def paired_interval(
    arm: Mapping[int, float], reference: Mapping[int, float], level: float = 0.95
) -> Interval:
    """Student's t interval of arm minus reference over the seeds that both have.

    With one pair the bounds are infinite. ValueError if there is no pair, or if `level` is not
    between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level}: expected a number between 0 and 1")
    seeds = sorted(arm.keys() & reference.keys())
    if not seeds:
        raise ValueError("no seed is in both arms")
    differences = [arm[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = t_quantile((1 + level) / 2, len(differences) - 1) * error
    return Interval(mean, mean - half, mean + half, len(differences))


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


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the deviation of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
