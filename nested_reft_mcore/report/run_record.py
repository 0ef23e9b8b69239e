"""Read a run directory as it is found: whole, unfinished, resumed, empty or damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.observability.environment import ENVIRONMENT_FILE
from nested_reft_mcore.observability.tracking import METRICS_FILE, whole_lines
from nested_reft_mcore.report.evaluation_files import (
    FIGURES_FILE,
    evaluated_step,
    is_evaluation,
    read_figures,
)

CONFIG_FILE = "config.yaml"
PLAN = "nested/plan"
"""Name of the one text in a line of metrics: what the step skipped."""
_BETWEEN_STEPS = ("testing", "save_checkpoint")
_LEAST_PAUSE = 20.0
"""Seconds: a start takes longer than the pauses of a run that goes on."""
_LATE = ("timing_s/", "checkpoint/")
"""A line with nothing but these belongs to a step that has a line already."""


@dataclass(frozen=True)
class RunRecord:
    """One run, and what is odd about it."""

    name: str
    directory: Path
    command: str
    """`train`, `sft` or `evaluate`."""
    steps: list[dict[str, float | None]]
    """Metrics of each step that was recorded, ascending, each step once; with `step` and `time`."""
    plans: dict[int, str] = field(default_factory=dict)
    """What each step skipped, as `LayerSkipPlan.describe` says it."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """For people: what is missing, unfinished, repeated or damaged."""

    @property
    def num_steps(self) -> int | None:
        """Steps that the configuration asks for; None where it cannot be read."""
        section = self.config.get(self.command)
        found = section.get("num_steps") if isinstance(section, Mapping) else None
        return found if isinstance(found, int) else None

    @property
    def last_step(self) -> int:
        """The last step that is done; 0 where none is."""
        return int(self.steps[-1]["step"] or 0) if self.steps else 0

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in alphabetical order."""
        return sorted({name for step in self.steps for name in step} - {"step", "time"})


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """All of them, under names that tell them apart.

    Raises:
        UserError: a directory is not there, is no run directory, or is given twice.
    """
    seen: dict[Path, Path] = {}
    for directory in directories:
        _check_is_run(directory)
        if (twin := seen.setdefault(directory.resolve(), directory)) is not directory:
            raise UserError(f"{directory}: the same run as {twin}; expected each run once")
    names = _names([directory.resolve() for directory in directories])
    return [read_run(path, name) for path, name in zip(directories, names, strict=True)]


def read_run(directory: Path, name: str) -> RunRecord:
    """What the directory holds; what cannot be read is said in `notes`."""
    if is_evaluation(directory):
        return _read_evaluation(directory, name)
    notes: list[str] = []
    config = _read_mapping(directory / CONFIG_FILE, notes)
    environment = _read_mapping(directory / ENVIRONMENT_FILE, notes)
    steps, plans = _read_steps(directory / METRICS_FILE, notes)
    command = "sft" if any("sft/loss" in step for step in steps) else "train"
    run = RunRecord(name, directory, command, steps, plans, config, environment, notes)
    notes += _state(run)
    return run


def _read_evaluation(directory: Path, name: str) -> RunRecord:
    """What `nested-reft evaluate` has written: its figures are those of a single step."""
    found = read_figures(directory)
    notes = [] if found else [f"{FIGURES_FILE} is missing or cannot be read"]
    parts = {key: found.get(key) for key in ("metrics", "config", "environment")}
    metrics, config, environment = (p if isinstance(p, dict) else {} for p in parts.values())
    step: dict[str, float | None] = {"step": evaluated_step(found), "time": None}
    step |= {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    steps = [step] if metrics else []
    return RunRecord(name, directory, "evaluate", steps, {}, config, environment, notes)


def _check_is_run(directory: Path) -> None:
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "not found"
        raise UserError(
            f"{directory}: {what}; expected a run directory (run_dir of a run), or an evaluation's"
        )
    if any((directory / name).exists() for name in (METRICS_FILE, "rollouts")):
        return
    if is_evaluation(directory):
        return
    inside = _runs_inside(directory)
    # A run that has just begun has its configuration alone; so has a folder for runs.
    if (directory / CONFIG_FILE).exists() and not inside:
        return
    hint = ""
    if inside:
        more = f" and {len(inside) - 6} more" if len(inside) > 6 else ""
        hint = f"; there are runs inside it: {' '.join(map(str, inside[:6]))}{more}"
    raise UserError(
        f"{directory}: no run directory: expected {METRICS_FILE}, {CONFIG_FILE} or rollouts in "
        f"it{hint}"
    )


def _runs_inside(directory: Path) -> list[Path]:
    """Run directories up to three levels below."""
    return sorted(
        {
            path.parent
            for depth in range(1, 4)
            for path in directory.glob("*/" * depth + METRICS_FILE)
        }
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """A YAML or JSON file of a run; empty, with a note, where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} holds no sections")
        return {}
    return found


def _read_steps(
    path: Path, notes: list[str]
) -> tuple[list[dict[str, float | None]], dict[int, str]]:
    """Metrics by step. Where a run went back, what it wrote last counts."""
    if not path.is_file():
        notes.append(f"{METRICS_FILE} is missing: nothing was recorded")
        return [], {}
    by_step: dict[int, dict[str, float | None]] = {}
    plans: dict[int, str] = {}
    replaced: set[int] = set()
    num_whole = 0
    for _, entry in whole_lines(path):
        num_whole += 1
        step = entry["step"]
        numbers: dict[str, float | None] = {
            name: value
            for name, value in entry.items()
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        }
        is_late = all(name.startswith(_LATE) for name in numbers.keys() - {"step", "time"})
        if is_late and step in by_step:
            _add(by_step[step], numbers)
            continue
        overtaken = [known for known in by_step if known >= step]
        replaced.update(overtaken)
        for known in overtaken:
            del by_step[known]
            plans.pop(known, None)
        by_step[step] = numbers
        if isinstance(entry.get(PLAN), str):
            plans[step] = entry[PLAN]
    with path.open("rb") as file:
        torn = sum(1 for line in file if line.strip()) - num_whole
    if torn:
        notes.append(f"{METRICS_FILE}: {torn} of its lines cannot be read (torn by a kill?)")
    if replaced:
        notes.append(
            f"went back {len(replaced)} steps and wrote steps {min(replaced)} to "
            f"{max(replaced)} again: what was written last counts"
        )
    return [by_step[step] for step in sorted(by_step)], plans


def _add(step: dict[str, float | None], late: Mapping[str, float | None]) -> None:
    """Times that were still to come for a step."""
    for name, value in late.items():
        if name.startswith("timing_s/") and value is not None:
            step[name] = (step.get(name) or 0.0) + value
        elif name not in ("step", "time"):
            step[name] = value


def _pauses(steps: Sequence[Mapping[str, float | None]]) -> list[float]:
    """Seconds between two steps that no timer accounts for, where they are many."""
    gaps, own = [], []
    for before, step in pairwise(steps):
        start, end, took = before.get("time"), step.get("time"), step.get("timing_s/step")
        if start is None or end is None or took is None:
            continue
        own.append(took + sum(step.get(f"timing_s/{phase}") or 0.0 for phase in _BETWEEN_STEPS))
        gaps.append(end - start - own[-1])
    usual = sorted(own)[len(own) // 2] if own else 0.0
    return [gap for gap in gaps if gap > max(_LEAST_PAUSE, 3 * usual)]


def _state(run: RunRecord) -> list[str]:
    """How far the run is, and what is unusual about its numbers."""
    notes = []
    wanted = run.num_steps
    if not run.steps:
        notes.append("no step is recorded yet")
    elif wanted is not None and run.last_step < wanted:
        why = "it stopped on request and is to be started again"
        if not (run.directory / "requeue").exists():
            why = "it is still running, or was ended"
        notes.append(f"unfinished: {run.last_step} of {wanted} steps ({why})")
    pauses = _pauses(run.steps)
    if pauses:
        notes.append(
            f"resumed: {len(pauses)} pauses between steps, {sum(pauses) / 60:,.0f} minutes in all; "
            "wall time includes them"
        )
    earlier = sorted(run.directory.glob("metrics.*.jsonl"))
    if earlier:
        names = ", ".join(path.name for path in earlier)
        notes.append(f"earlier histories of this directory are not shown: {names}")
    broken: dict[str, int] = {}
    for step in run.steps:
        for name, value in step.items():
            broken[name] = broken.get(name, 0) + (value is None)
    told = [f"{name} in {count} steps" for name, count in sorted(broken.items()) if count]
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        notes.append(f"not finite: {', '.join(told[:5])}{more}")
    return notes
