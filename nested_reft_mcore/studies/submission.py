"""A study as Slurm job arrays: what is to run goes into a file, and `slurm/sweep.sh` reads it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.studies.grid import Grid, StudyRun, missing_data
from nested_reft_mcore.studies.prediction import Cluster, Prediction
from nested_reft_mcore.studies.queue import SUBMISSIONS
from nested_reft_mcore.studies.states import RunState, now, set_aside, write_aside
from nested_reft_mcore.studies.status import status_of

SCRIPT = "slurm/sweep.sh"
"""Of the project's root, where `submit` is to be called, as all scripts of slurm/ are."""
_DUE = ("missing", "stopped")
_SECONDS = 60


@dataclass(frozen=True)
class Shape:
    """What each task of an array asks for."""

    nodes: int
    tasks_per_node: int


def submit(
    grid: Grid,
    runs: Sequence[StudyRun],
    predictions: Mapping[str, Prediction],
    cluster: Cluster,
    *,
    max_running: int,
    retry: bool,
    dry_run: bool,
    options: Sequence[str],
) -> int:
    """Submit what is due and fits, an array for each number of nodes and GPUs; the exit code.

    Raises:
        UserError: there is no sbatch, or it refuses; this is not the project's root.
    """
    if not Path(SCRIPT).is_file():
        raise UserError(f"{SCRIPT}: not found from here; expected to be in the project's root")
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "submit: sbatch is not found; expected a machine of a Slurm cluster, or --dry-run"
        )
    missing = sorted({run.missing for run in runs if run.missing})
    if missing and not dry_run:
        raise UserError(f"submit: not found: {', '.join(missing)}; get the models first")
    for name in missing:
        print(f"not found: {name}; without it `submit` refuses")
    for path in missing_data(runs):
        print(f"not found from here: {path}; the jobs look for it in WORK_DIR (slurm/env.sh)")
    arrays = _arrays(runs, predictions, cluster, _due(grid, runs, predictions, retry, dry_run))
    if not arrays:
        print("nothing to submit: every run is finished, under way, broken, or does not fit")
        return 0
    for shape, members in arrays.items():
        _submit_array(grid, shape, members, max_running, dry_run, options)
    return 0


def _due(
    grid: Grid,
    runs: Sequence[StudyRun],
    predictions: Mapping[str, Prediction],
    retry: bool,
    dry_run: bool,
) -> set[str]:
    """Names of the runs to submit; says which are left out though they are not finished."""
    states = status_of(grid, predictions)
    wanted = (*_DUE, "broken", "stale") if retry else _DUE
    due = set()
    for run in runs:
        state = states[run.name]
        problem = predictions[run.name].problem
        if state.kind in wanted and problem is None:
            due.add(run.name)
            if state.begins_anew and not dry_run:
                aside = set_aside(run.directory).name
                print(f"{state.kind}: {run.name}: what there was is now {aside}")
        elif state.kind != "finished":
            told = state if problem is None else RunState("does not fit", detail=problem)
            print(f"left out: {run.name}: {told.describe(run.num_steps)}")
    return due


def _arrays(
    runs: Sequence[StudyRun],
    predictions: Mapping[str, Prediction],
    cluster: Cluster,
    due: set[str],
) -> dict[Shape, list[StudyRun]]:
    """The runs of each shape, in the study's order: all tasks of an array are alike."""
    arrays: dict[Shape, list[StudyRun]] = {}
    for run in runs:
        if run.name in due:
            per_node = min(run.point.world_size, cluster.gpus_per_node)
            shape = Shape(predictions[run.name].nodes, per_node)
            arrays.setdefault(shape, []).append(run)
    return arrays


def _submit_array(
    grid: Grid,
    shape: Shape,
    members: Sequence[StudyRun],
    max_running: int,
    dry_run: bool,
    options: Sequence[str],
) -> None:
    number = _next_number(grid.output)
    file = grid.output / SUBMISSIONS / f"{number:03}.runs"
    log = str((grid.output / SUBMISSIONS / f"{number:03}-%A_%a.log").absolute())
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={grid.study.name}",
        f"--array=0-{len(members) - 1}%{min(max_running, len(members))}",
        f"--nodes={shape.nodes}",
        f"--ntasks-per-node={shape.tasks_per_node}",
        f"--gpus-per-node={shape.tasks_per_node}",
        f"--output={log}",
        *options,
        SCRIPT,
        "--study",
        str(file.absolute()),
    ]
    if not grid.study.keep_checkpoints:
        command.append("--drop-checkpoints")
    print(shlex.join(command))
    if dry_run:
        each = f"{shape.nodes} x {shape.tasks_per_node} GPUs each"
        print(f"dry run: {len(members)} tasks of {each}; nothing was written or submitted")
        return
    write_aside(file, runs_text(members))
    job = _sbatch(command)
    note = {"job": job, "submitted": now(), "log": log, "runs": [run.name for run in members]}
    write_aside(file.with_suffix(".json"), json.dumps(note, indent=1))
    print(f"job {job}: {len(members)} tasks; how far it is: scaling_study.py status {grid.path}")


def runs_text(members: Sequence[StudyRun]) -> str:
    """A line for each task: run directory, configuration, options, between tabs.

    Text, so that the batch script needs no Python to read it. `grid` sees to it that no option
    holds a tab or a line break.
    """
    lines = []
    for run in members:
        place = str(run.directory.absolute())
        # A job's working directory may be another.
        own = f"run_dir={json.dumps(place)}"
        words = [place, str(run.config_path.absolute()), *run.words, own]
        lines.append("\t".join(words) + "\n")
    return "".join(lines)


def _next_number(output: Path) -> int:
    numbers = [0]
    for path in (output / SUBMISSIONS).glob("*.runs"):
        if match := re.fullmatch(r"(\d+)\.runs", path.name):
            numbers.append(int(match[1]))
    return max(numbers) + 1


def _sbatch(command: Sequence[str]) -> str:
    """Submit; the job's number."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"sbatch: {error}") from None
    number = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not number.isdigit():
        told = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise UserError(f"sbatch refuses: {told}")
    return number
