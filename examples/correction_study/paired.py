"""Means and confidence intervals of paired differences between the arms of a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nested_reft_mcore.studies.student import t_quantile


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


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the deviation of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
