"""How well a calibrated profile predicts runs that it has not seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nested_reft_mcore.planning.calibration_points import Point, Row
from nested_reft_mcore.planning.calibration_ranking import (
    Pair,
    Ranking,
    Together,
    Verdict,
    drift_of,
    pairs_of,
    rank,
)
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.measured_run import PARTS, Average


@dataclass(frozen=True)
class Check:
    """Points that were held out, and pairs of which one was at least."""

    rows: tuple[Row, ...]
    rankings: tuple[Ranking, ...]
    drift: float | None
    """Deviation of the logarithm of what a run takes, from run to run of one seed, by updates that
    do the same; None where no two runs of a seed do the same updates."""
    alike: tuple[tuple[str, str], ...] = ()
    """Pairs of laws that cannot differ: every plan leaves the stages the same numbers of layers."""

    @property
    def median_error(self) -> float:
        """Of step times, without signs."""
        return statistics.median(abs(row.error) for row in self.rows)

    @property
    def median_tokens_error(self) -> float:
        """Of tokens a second, without signs."""
        return statistics.median(abs(row.tokens_error) for row in self.rows)

    @property
    def worst(self) -> Row:
        """The largest error, in percent of what was measured, whatever its sign."""
        return max(self.rows, key=lambda row: abs(row.error))

    def laws_together(self) -> Together | None:
        """Pairs that differ in the law: each point has one law, so no two of them share one."""
        found = [ranking for ranking in self.rankings if ranking.what == "law"]
        return Together.of(found) if found else None

    def count(self, what: str, verdict: Verdict) -> int:
        """Pairs of a kind with a verdict."""
        return sum(r.what == what and r.verdict == verdict for r in self.rankings)


def predicted_seconds(profile: HardwareProfile, point: Point, average: Average) -> dict[str, float]:
    """Average over its runs, part by part, by the model of `plan`."""
    times = [run.predict(profile, average) for run in point.runs]
    return {part: average([getattr(time, part) for time in times]) for part in PARTS}


def check(
    held: Sequence[Point],
    kept: Sequence[Point],
    predict: Callable[[Point, Average], dict[str, float]],
) -> Check:
    """Compare predictions with what was measured.

    Args:
        held: Points that the profile has not seen: they are the rows.
        kept: Those that it was calibrated on: the other one of some pairs.
        predict: Seconds of each part of a point's step, averaged as asked.
    """

    def row(point: Point) -> Row:
        mean = math.fsum(predict(point, statistics.fmean).values())
        return Row(point, predict(point, statistics.median), mean)

    rows, seen = [row(point) for point in held], [row(point) for point in kept]
    drift = drift_of([*held, *kept])
    pairs = list(pairs_of(rows, seen))
    return Check(
        tuple(rows),
        tuple(rank(pair, drift) for pair in pairs if not pair.is_alike),
        drift.in_seed,
        tuple(_names(pair) for pair in pairs if pair.is_alike),
    )


def _names(pair: Pair) -> tuple[str, str]:
    return pair.one.point.name, pair.other.point.name
