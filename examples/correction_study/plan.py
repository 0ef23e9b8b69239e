"""Which runs a study consists of, in which order, and what has become of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REFERENCE = "on_policy"
"""The arm that every other one of its setup is compared with."""
WARM_UP = "warm_up"
"""Takes the place of the arm in the directory of a warm-up."""
OUTCOME_FILE = "outcome.json"
"""Written into a run's directory when its process has ended, and not before."""

EVALUATION_FILE = "accuracy.json"
"""In a run's directory: the accuracies of its final policy, where they are measured apart."""


@dataclass(frozen=True)
class Setup:
    """A task, a model and a warm-up, from which the arms of a grid start."""

    name: str
    title: str
    config: Path
    task: tuple[str, ...]
    """Arguments of make_task.py."""
    warm_up: dict[str, Any]
    """Options of the warm-up beside the common ones."""
    training: dict[str, Any]
    """Options of every reinforcement run beside the common ones."""
    evaluation: dict[str, Any] | None
    """Options of an evaluation by a process of its own, at the end; None: training does it."""
    probe: dict[str, Any]
    """Options of `nested-reft probe`, which runs of the law `sensitivity` begin with."""
    warm_up_of: str
    """Setup whose warm-ups these runs start from, most often itself."""


@dataclass(frozen=True)
class StudyRun:
    """One process: a warm-up, or an arm with one seed."""

    setup: Setup
    arm: str
    seed: int
    options: dict[str, Any]
    start: str | None
    """Name of the warm-up that it goes on from; None for a warm-up."""

    @property
    def name(self) -> str:
        """Also its directory below the study's."""
        return f"{self.setup.name}/{self.arm}/seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """Arms that are compared, all with the same seeds."""

    name: str
    setup: Setup
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    exploratory: bool


@dataclass(frozen=True)
class Study:
    """The whole file, its runs in order of priority."""

    grids: tuple[Grid, ...]
    runs: tuple[StudyRun, ...]
    """Each once, though several grids may hold it; a warm-up before the first run it starts."""


def load_study(path: Path, only: Sequence[str] | None = None) -> Study:
    """Read a study file, or the grids of it that `only` names. ValueError for an unknown name."""
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    setups = {name: _setup(path, text, name) for name in text["setups"]}
    grids = tuple(_grid(entry, setups, text["arms"]) for entry in text["grids"])
    names = [grid.name for grid in grids]
    for name in only or []:
        if name not in names:
            raise ValueError(f"{path}: no grid {name!r}; expected one of {', '.join(names)}")
    grids = tuple(grid for grid in grids if not only or grid.name in only)
    runs: dict[str, StudyRun] = {}
    for grid in grids:
        for run in _runs_of(grid, setups, text["arms"]):
            runs.setdefault(run.name, run)
    return Study(grids, tuple(runs.values()))


def _setup(path: Path, text: dict[str, Any], name: str) -> Setup:
    entry = text["setups"][name]
    return Setup(
        name=name,
        title=entry["title"],
        config=(path.parent / text["config"]).resolve(),
        task=tuple(str(word) for word in entry["task"]),
        warm_up={**text["common"], **entry.get("model", {}), **entry.get("warm_up", {})},
        training={
            **text["common"],
            **text["training"],
            **entry.get("model", {}),
            **entry.get("training", {}),
        },
        evaluation=entry.get("evaluation"),
        probe=entry.get("probe", {}),
        warm_up_of=entry.get("warm_up_of", name),
    )


def _grid(entry: dict[str, Any], setups: dict[str, Setup], arms: dict[str, Any]) -> Grid:
    if entry["setup"] not in setups:
        raise ValueError(f"grid {entry['name']}: no setup {entry['setup']!r}")
    unknown = [arm for arm in entry["arms"] if arm not in arms]
    if unknown:
        raise ValueError(f"grid {entry['name']}: no arm {unknown[0]!r}")
    seeds = entry["seeds"]
    return Grid(
        name=entry["name"],
        setup=setups[entry["setup"]],
        arms=tuple(entry["arms"]),
        seeds=tuple(range(seeds) if isinstance(seeds, int) else seeds),
        exploratory=bool(entry.get("exploratory", False)),
    )


def _runs_of(grid: Grid, setups: dict[str, Setup], arms: dict[str, Any]) -> Iterator[StudyRun]:
    """Seed by seed, so that a study that is interrupted has whole pairs."""
    origin = setups[grid.setup.warm_up_of]
    for seed in grid.seeds:
        start = StudyRun(origin, WARM_UP, seed, origin.warm_up, None)
        yield start
        for arm in (REFERENCE, *(arm for arm in grid.arms if arm != REFERENCE)):
            yield StudyRun(grid.setup, arm, seed, {**grid.setup.training, **arms[arm]}, start.name)


def read_outcome(directory: Path) -> dict[str, Any] | None:
    """What the runner wrote when the process ended; None if it never did."""
    try:
        outcome = json.loads((directory / OUTCOME_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return outcome if isinstance(outcome, dict) else None


def state_of(run: StudyRun, root: Path) -> str:
    """What has become of a run.

    `missing`: never started. `interrupted`: started, and its end was not recorded. `broken`: it
    ended with an error. `stale`: it ended well, with other options than the study has now.
    `finished`: it need not run again.
    """
    directory = root / run.name
    outcome = read_outcome(directory)
    if outcome is None:
        return "interrupted" if directory.exists() else "missing"
    if outcome["exit_code"] != 0:
        return "broken"
    return "finished" if outcome["options"] == run.options else "stale"
