"""Points of a study, measured and predicted: runs that differ in their seed alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.planning.measured_run import PARTS, MeasuredRun

MEDIAN_NOISE = 1.2533
"""The median of n normal numbers deviates by this over sqrt(n) of theirs."""


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
        return MEDIAN_NOISE * self.mean_noise

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
