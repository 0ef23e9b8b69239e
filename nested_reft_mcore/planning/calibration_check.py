"""How well a calibrated profile predicts runs that it has not seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.measured_run import PARTS, Average, MeasuredRun

Verdict = Literal["right", "wrong", "indistinguishable"]
_NOISES = 2.0
"""Differences of fewer deviations than this are noise."""
_MEDIAN_NOISE = 1.2533
_TIE = 0.005
"""Predictions that differ by less, as a logarithm, say that two are equally fast."""


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seed alone."""

    name: str
    runs: tuple[MeasuredRun, ...]
    key: tuple[Any, ...]
    """What it sorts by: parameters, sizes of TP, PP and DP, layers skipped, law."""

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of a step."""
        return statistics.median(run.tokens for run in self.runs)

    @property
    def seconds(self) -> dict[str, float]:
        """Median over all steps of all runs, part by part."""
        steps = [step for run in self.runs for step in run.steps]
        return {part: statistics.median(step.seconds[part] for step in steps) for part in PARTS}

    @property
    def step_seconds(self) -> float:
        """Median over all steps of all runs."""
        return statistics.median(step.total for run in self.runs for step in run.steps)

    @property
    def mean_step_seconds(self) -> float:
        """Mean over all steps of all runs."""
        return statistics.fmean(step.total for run in self.runs for step in run.steps)

    @property
    def noise(self) -> float:
        """Deviation of the logarithm of `step_seconds`, from the scatter of the steps.

        A median of n normal numbers deviates by 1.25 / sqrt(n) of theirs.
        """
        return _MEDIAN_NOISE * self.mean_noise

    @property
    def mean_noise(self) -> float:
        """The same of `mean_step_seconds`."""
        logs = [math.log(step.total) for run in self.runs for step in run.steps]
        if len(logs) < 2:
            return 0.0
        return statistics.stdev(logs) / math.sqrt(len(logs))


@dataclass(frozen=True)
class Row:
    """A point, measured and predicted."""

    point: Point
    predicted: dict[str, float]
    """Seconds of each part."""
    predicted_mean_step: float
    """Seconds of the step, the mean over the plans that the runs had."""

    @property
    def predicted_step(self) -> float:
        """Seconds of the step."""
        return math.fsum(self.predicted.values())

    @property
    def error(self) -> float:
        """Of the predicted step, as a share of the measured one."""
        return self.predicted_step / self.point.step_seconds - 1

    @property
    def tokens_error(self) -> float:
        """Of the predicted tokens a second."""
        return self.point.step_seconds / self.predicted_step - 1


@dataclass(frozen=True)
class Ranking:
    """Two points that differ in one thing."""

    what: str
    """`layout` or `law`."""
    one: str
    other: str
    measured: float
    """How many times as long a step of the other one takes: the median step, but the mean one where
    the law differs, for a law's plans may cost this much in one step and that much in the next."""
    predicted: float
    noise: float
    """Deviation of the logarithm of `measured`, from the scatter of the steps."""
    verdict: Verdict


@dataclass(frozen=True)
class Together:
    """All pairs of a kind, by the geometric mean of their ratios."""

    measured: float
    noise: float
    """Deviation of its logarithm; right where no two pairs share a point."""
    predicted: float


@dataclass(frozen=True)
class Check:
    """Points that were held out, and pairs of which one was at least."""

    rows: tuple[Row, ...]
    rankings: tuple[Ranking, ...]

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
        """The largest error."""
        return max(self.rows, key=lambda row: abs(math.log1p(row.error)))

    def laws_together(self) -> Together | None:
        """Pairs that differ in the law: each point has one law, so no two of them share one."""
        pairs = [ranking for ranking in self.rankings if ranking.what == "law"]
        if not pairs:
            return None
        return Together(
            math.exp(statistics.fmean(math.log(pair.measured) for pair in pairs)),
            math.hypot(*(pair.noise for pair in pairs)) / len(pairs),
            math.exp(statistics.fmean(math.log(pair.predicted) for pair in pairs)),
        )

    def count(self, what: str, verdict: Verdict) -> int:
        """Pairs of a kind with a verdict."""
        return sum(r.what == what and r.verdict == verdict for r in self.rankings)


def points_of(runs: Iterable[MeasuredRun]) -> list[Point]:
    """Runs put together that differ in their seed and directory alone, in a fixed order."""
    found: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        same = run.config.model_copy(update={"seed": 0, "run_dir": ""})
        found.setdefault(same.model_dump_json() + str(run.layout.world_size), []).append(run)
    points = [Point(_common_name(same), tuple(same), _key(same[0])) for same in found.values()]
    return sorted(points, key=lambda point: (point.key, point.name))


def split_half(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Every second point, in the order of `points_of`, is held out."""
    return list(points[0::2]), list(points[1::2])


def split_by_name(
    points: Sequence[Point], patterns: Sequence[str]
) -> tuple[list[Point], list[Point]]:
    """Points whose name fits a pattern, as file names do in a shell, are held out.

    Raises:
        UserError: a pattern fits no point, or too few are left.
    """
    for pattern in patterns:
        if not any(fnmatch(point.name, pattern) for point in points):
            names = ", ".join(point.name for point in points[:6])
            raise UserError(f"--hold-out {pattern}: fits none of {names}, ...")
    held = [p for p in points if any(fnmatch(p.name, pattern) for pattern in patterns)]
    kept = [point for point in points if point not in held]
    if len(kept) < 2:
        raise UserError(f"--hold-out: leaves {len(kept)} points to calibrate on; expected 2")
    return kept, held


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
    return Check(tuple(rows), tuple(_rankings(rows, seen)))


def _rankings(rows: Sequence[Row], seen: Sequence[Row]) -> Iterable[Ranking]:
    for place, one in enumerate(rows):
        for other in (*rows[place + 1 :], *seen):
            what = _difference(one.point, other.point)
            if what is not None:
                first, second = sorted((one, other), key=lambda row: row.point.key)
                yield _ranking(what, first, second)


def _difference(one: Point, other: Point) -> str | None:
    """What they differ in, where that is the layout alone, or the law alone on several stages."""
    pairs = zip(one.key, other.key, strict=True)
    changed = [place for place, pair in enumerate(pairs) if pair[0] != pair[1]]
    if changed == [len(one.key) - 1]:
        return "law" if one.runs[0].layout.pipeline > 1 else None
    return "layout" if changed and set(changed) <= {1, 2, 3} else None


def _ranking(what: str, one: Row, other: Row) -> Ranking:
    if what == "law":
        measured = math.log(other.point.mean_step_seconds / one.point.mean_step_seconds)
        predicted = math.log(other.predicted_mean_step / one.predicted_mean_step)
        noise = math.hypot(one.point.mean_noise, other.point.mean_noise)
    else:
        measured = math.log(other.point.step_seconds / one.point.step_seconds)
        predicted = math.log(other.predicted_step / one.predicted_step)
        noise = math.hypot(one.point.noise, other.point.noise)
    if abs(measured) <= _NOISES * noise:
        verdict: Verdict = "indistinguishable"
    else:
        is_right = abs(predicted) > _TIE and (measured > 0) == (predicted > 0)
        verdict = "right" if is_right else "wrong"
    names = one.point.name, other.point.name
    return Ranking(what, *names, math.exp(measured), math.exp(predicted), noise, verdict)


def _key(run: MeasuredRun) -> tuple[Any, ...]:
    layout, nested = run.layout, run.config.nested
    count = num_skipped(nested, layout.architecture.num_layers)
    if run.config.rollout.mode == "full":
        count = 0
    sizes = (layout.tensor, layout.pipeline, layout.data)
    return (layout.model_parameters, *sizes, count, nested.law if count else "")


def _common_name(runs: Sequence[MeasuredRun]) -> str:
    """The first one's, without its seed where there are several."""
    if len(runs) == 1:
        return runs[0].name
    parts = [run.name.replace("/", ".").split(".") for run in runs]
    same = [part for part in parts[0] if all(part in other for other in parts[1:])]
    return ".".join(same) or runs[0].name
