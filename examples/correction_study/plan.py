"""Which runs a study consists of, in which order, and what has become of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.config.yaml_reader import read_yaml

REFERENCE = "on_policy"
"""The arm that every other one of its setup is compared with."""
WARM_UP = "warm_up"
"""Takes the place of the arm in the directory of a warm-up."""
OUTCOME_FILE = "outcome.json"
"""Written into a run's directory when its process has ended, and not before."""

EVALUATION_FILE = "accuracy.json"
"""In a run's directory: the accuracies of its final policy, where they are measured apart."""


Options = dict[str, Any]
"""Options of `nested-reft`, `section.field` to value."""
Seed = Annotated[int, Field(ge=0)]


class SetupSection(Section):
    """A setup, as the study file has it; `Setup` says what the fields are."""

    title: str
    task: tuple[str | int | float, ...]
    model: Options = Field(default_factory=dict)
    warm_up: Options = Field(default_factory=dict)
    training: Options = Field(default_factory=dict)
    evaluation: Options | None = None
    probe: Options = Field(default_factory=dict)
    warm_up_of: str | None = None


class GridSection(Section):
    """A grid, as the study file has it."""

    name: str
    setup: str
    seeds: Annotated[int, Field(gt=0)] | Annotated[tuple[Seed, ...], Field(min_length=1)]
    """So many from 0 up, or these."""
    arms: tuple[str, ...] = Field(min_length=1)
    exploratory: bool = False


class StudyFile(Section):
    """The whole file."""

    config: str
    common: Options
    training: Options
    setups: dict[str, SetupSection]
    arms: dict[str, Options]
    grids: tuple[GridSection, ...]


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
    """Read a study file, or the grids of it that `only` names.

    Raises:
        UserError: whatever is wrong with it, with file, line and key; or an unknown name.
    """
    file = read_yaml(path)
    text = section_from_dict(StudyFile, file.data, str(path), file.sources)
    _check_names(path, text)
    names = [grid.name for grid in text.grids]
    for name in only or []:
        if name not in names:
            raise UserError(f"{path}: no grid {name!r}; expected one of {', '.join(names)}")
    setups = {name: _setup(path, text, name) for name in text.setups}
    wanted = [grid for grid in text.grids if not only or grid.name in only]
    grids = tuple(_grid(entry, setups) for entry in wanted)
    runs: dict[str, StudyRun] = {}
    for grid in grids:
        for run in _runs_of(grid, setups, text.arms):
            runs.setdefault(run.name, run)
    return Study(grids, tuple(runs.values()))


def _check_names(path: Path, text: StudyFile) -> None:
    """UserError for a name that nothing has, or that two grids have."""
    config = path.parent / text.config
    if not config.is_file():
        raise UserError(f"{path}: config: {config} does not exist")
    if not text.grids:
        raise UserError(f"{path}: grids: there is none; expected a list with one or more")
    if REFERENCE not in text.arms:
        raise UserError(f"{path}: arms: no {REFERENCE!r}, which the others are compared with")
    for name, setup in text.setups.items():
        if setup.warm_up_of is not None and setup.warm_up_of not in text.setups:
            raise UserError(f"{path}: setups.{name}: no setup {setup.warm_up_of!r} to start from")
    names = [grid.name for grid in text.grids]
    for grid in text.grids:
        if names.count(grid.name) > 1:
            raise UserError(f"{path}: two grids are called {grid.name!r}")
        if grid.setup not in text.setups:
            raise UserError(f"{path}: grid {grid.name}: no setup {grid.setup!r}")
        for arm in grid.arms:
            if arm not in text.arms:
                raise UserError(f"{path}: grid {grid.name}: no arm {arm!r}")


def _setup(path: Path, text: StudyFile, name: str) -> Setup:
    entry = text.setups[name]
    return Setup(
        name=name,
        title=entry.title,
        config=(path.parent / text.config).resolve(),
        task=tuple(str(word) for word in entry.task),
        warm_up={**text.common, **entry.model, **entry.warm_up},
        training={**text.common, **text.training, **entry.model, **entry.training},
        evaluation=entry.evaluation,
        probe=entry.probe,
        warm_up_of=entry.warm_up_of or name,
    )


def _grid(entry: GridSection, setups: dict[str, Setup]) -> Grid:
    seeds = entry.seeds
    return Grid(
        name=entry.name,
        setup=setups[entry.setup],
        arms=entry.arms,
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else seeds,
        exploratory=entry.exploratory,
    )


def _runs_of(grid: Grid, setups: dict[str, Setup], arms: dict[str, Options]) -> Iterator[StudyRun]:
    """Seed by seed, so that a study that is interrupted has whole pairs."""
    origin = setups[grid.setup.warm_up_of]
    for seed in grid.seeds:
        start = StudyRun(origin, WARM_UP, seed, origin.warm_up, None)
        yield start
        for arm in (REFERENCE, *(arm for arm in grid.arms if arm != REFERENCE)):
            yield StudyRun(grid.setup, arm, seed, {**grid.setup.training, **arms[arm]}, start.name)


def read_outcome(directory: Path) -> dict[str, Any] | None:
    """What the runner wrote when the process ended; None if it never did, or not all of it."""
    try:
        outcome = json.loads((directory / OUTCOME_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    is_whole = isinstance(outcome, dict) and {"exit_code", "options"} <= outcome.keys()
    return outcome if is_whole else None


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
