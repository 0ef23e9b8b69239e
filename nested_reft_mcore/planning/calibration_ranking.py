"""Pairs of points that differ in layout or law alone: is the faster one predicted to be faster?

A machine drifts from run to run by more than the steps of a run scatter. Updates tell by how much:
they skip nothing, so runs of one model, layout and batch do the same ones whatever their plans.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nested_reft_mcore.planning.calibration_points import MEDIAN_NOISE, Point, Row
from nested_reft_mcore.planning.measured_run import MeasuredRun

Kind = Literal["layout", "law"]
Verdict = Literal["right", "wrong", "missed", "indistinguishable"]
"""`right`, `wrong`: predicted and measured differences are both beyond the noise. `missed`: one of
them is, and they differ from each other by more than the noise. `indistinguishable`: the rest."""
_NOISES = 2.0
"""Differences of fewer deviations than this are noise."""
_TIE = 0.005
"""Predictions that differ by less, as a logarithm, say that two are equally fast."""
_LAYOUT_KEYS = {1, 2, 3}
"""Places of the sizes of TP, PP and DP in a point's key."""
_NO_WORK = {"seed", "run_dir", "nested", "parallel", "launch", "logging", "checkpoint"}
"""Sections that do not say what is generated and learnt."""


@dataclass(frozen=True)
class Drift:
    """Deviation of the logarithm of a run's seconds from run to run, by its median update."""

    in_seed: float | None
    """Of runs of one seed, which a study makes one after the other."""
    at_all: float | None
    """Of runs of any seed."""


@dataclass(frozen=True)
class Pair:
    """Two points that differ in one thing."""

    what: Kind
    one: Row
    other: Row

    @property
    def is_alike(self) -> bool:
        """Whether all plans of both leave the stages the same numbers of layers."""
        if self.what != "law":
            return False
        loads = {
            tuple(sorted(run.stage_loads(step.plan)))
            for row in (self.one, self.other)
            for run in row.point.runs
            for step in run.steps
        }
        return len(loads) == 1


@dataclass(frozen=True)
class Ranking:
    """A pair, measured and predicted."""

    what: Kind
    one: str
    other: str
    measured: float
    """How many times as long a step of the other one takes: the median step, but the mean one where
    the law differs, for a law's plans may cost this much in one step and that much in the next.
    Seed against seed where both have the same ones."""
    predicted: float
    updates: float
    """The same of the updates, measured: where only the law differs they do the same."""
    noise: float
    """Deviation of the logarithm of `measured`: scatter of the steps, and drift between runs."""
    verdict: Verdict


@dataclass(frozen=True)
class Together:
    """Pairs of a kind, by the geometric mean of their ratios."""

    measured: float
    noise: float
    """Deviation of its logarithm; right where no two pairs share a point."""
    predicted: float
    updates: float
    """Measured, of updates."""

    @classmethod
    def of(cls, pairs: Sequence[Ranking]) -> Together:
        """All of them; ValueError where there is none."""
        return cls(
            statistics.geometric_mean(pair.measured for pair in pairs),
            math.hypot(*(pair.noise for pair in pairs)) / len(pairs),
            statistics.geometric_mean(pair.predicted for pair in pairs),
            statistics.geometric_mean(pair.updates for pair in pairs),
        )


def drift_of(points: Iterable[Point]) -> Drift:
    """Pooled over all runs that share model, layout, batch and tokens of a step with another."""
    of_seed: dict[str, list[float]] = {}
    of_all: dict[str, list[float]] = {}
    for point in points:
        for run in point.runs:
            key = f"{_work(run)} {_layout(run)} {run.tokens}"
            seconds = math.log(run.seconds["update"])
            of_all.setdefault(key, []).append(seconds)
            of_seed.setdefault(f"{key} {run.config.seed}", []).append(seconds)
    return Drift(_pooled(of_seed.values()), _pooled(of_all.values()))


def pairs_of(rows: Sequence[Row], seen: Sequence[Row]) -> Iterator[Pair]:
    """Of `rows` with each other and with those of `seen`; the one that sorts first stands first."""
    for place, one in enumerate(rows):
        for other in (*rows[place + 1 :], *seen):
            what = _difference(one.point, other.point)
            if what is not None:
                yield Pair(what, *sorted((one, other), key=lambda row: row.point.key))


def rank(pair: Pair, drift: Drift) -> Ranking:
    """Whether the prediction says which is faster, where the measurement can tell."""
    one, other = pair.one, pair.other
    if pair.what == "law":
        predicted = math.log(other.predicted_mean_step / one.predicted_mean_step)
    else:
        predicted = math.log(other.predicted_step / one.predicted_step)
    runs = _by_seed(one.point), _by_seed(other.point)
    measured = _log_ratio(*runs, pair.what)
    noise = _noise(*runs, pair.what, drift)
    names = one.point.name, other.point.name
    updates = math.exp(_log_ratio(*runs, "update"))
    ratios = math.exp(measured), math.exp(predicted), updates
    return Ranking(pair.what, *names, *ratios, noise, _verdict(measured, predicted, noise))


def _verdict(measured: float, predicted: float, noise: float) -> Verdict:
    limit = _NOISES * noise
    seen, said = abs(measured) > limit, abs(predicted) > max(limit, _TIE)
    if seen and said:
        return "right" if (measured > 0) == (predicted > 0) else "wrong"
    if (seen or said) and abs(measured - predicted) > limit:
        return "missed"
    return "indistinguishable"


def _difference(one: Point, other: Point) -> Kind | None:
    """What they differ in, where that is the layout alone, or the law alone on several stages."""
    if _work(one.runs[0]) != _work(other.runs[0]):
        return None
    pairs = zip(one.key, other.key, strict=True)
    changed = {place for place, pair in enumerate(pairs) if pair[0] != pair[1]}
    if changed == {len(one.key) - 1}:
        return "law" if one.runs[0].layout.pipeline > 1 else None
    return "layout" if changed and changed <= _LAYOUT_KEYS else None


def _work(run: MeasuredRun) -> str:
    """What is generated and learnt, whatever the layout and the plans."""
    left_out = {**dict.fromkeys(_NO_WORK, True), "rollout": {"mode"}}
    return run.config.model_dump_json(exclude=left_out)


def _layout(run: MeasuredRun) -> str:
    return f"{run.config.parallel.model_dump_json()} {run.layout.world_size}"


def _by_seed(point: Point) -> dict[int, MeasuredRun]:
    return {run.config.seed: run for run in point.runs}


def _log_ratio(
    one: dict[int, MeasuredRun], other: dict[int, MeasuredRun], what: Literal[Kind, "update"]
) -> float:
    """Mean over seeds; over the same seeds it is the mean of ratios, seed against seed."""

    def mean(runs: dict[int, MeasuredRun]) -> float:
        return statistics.fmean(math.log(_seconds(run, what)) for run in runs.values())

    return mean(other) - mean(one)


def _seconds(run: MeasuredRun, what: Literal[Kind, "update"]) -> float:
    if what == "update":
        return run.seconds["update"]
    if what == "layout":
        return run.step_seconds
    return statistics.fmean(step.total for step in run.steps)


def _noise(
    one: dict[int, MeasuredRun], other: dict[int, MeasuredRun], what: Kind, drift: Drift
) -> float:
    """Scatter of the steps of each run, and drift between runs, in part counted twice."""
    factor = 1.0 if what == "law" else MEDIAN_NOISE
    between = drift.in_seed if one.keys() == other.keys() else drift.at_all
    parts = []
    for runs in (one, other):
        parts += [factor * _scatter(run) / len(runs) for run in runs.values()]
        parts.append((between or 0.0) / math.sqrt(len(runs)))
    return math.hypot(*parts)


def _scatter(run: MeasuredRun) -> float:
    """Deviation of the logarithm of the mean step, from those of the run."""
    logs = [math.log(step.total) for step in run.steps]
    return statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0


def _pooled(groups: Iterable[Sequence[float]]) -> float | None:
    """Deviation from the groups' means; None where no group has two values."""
    found = [group for group in groups if len(group) > 1]
    if not found:
        return None
    squares = sum((v - statistics.fmean(group)) ** 2 for group in found for v in group)
    return math.sqrt(squares / sum(len(group) - 1 for group in found))
