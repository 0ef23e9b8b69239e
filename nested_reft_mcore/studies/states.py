"""What has become of each run of a study, by what its directory holds."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nested_reft_mcore.config.checkpoint_layout import LATEST_FILE
from nested_reft_mcore.config.errors import UserError, reason_of
from nested_reft_mcore.config.load import CONFIG_FILE, load_config
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.observability.tracking import METRICS_FILE, whole_lines
from nested_reft_mcore.studies.grid import StudyRun

RECORD_FILE = "study.json"
"""In a run's directory: that `run` has started it, or how it ended."""
OUTPUT_FILE = "output.txt"
"""In a run's directory: what its process printed."""
LOCK_FILE = ".study.lock"
"""In the study's output: held while a `run` goes on."""
STEP_METRIC = "critic/rewards/mean"
"""In the line of every step, and in no other."""

Kind = Literal[
    "finished", "running", "queued", "stopped", "broken", "stale", "missing", "does not fit"
]
_NO_MATTER = ("run_dir", "launch", "logging", "checkpoint")
"""Options that change nothing of what a run measures."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    kind: Kind
    step: int = 0
    """Steps that it has recorded."""
    detail: str = ""
    """Which log to look at, what has changed, or why it does not fit."""
    is_damaged: bool = False
    """Broken, though it ran to its end: its metrics cannot be used."""

    @property
    def begins_anew(self) -> bool:
        """Whether a retry cannot go on from what there is: it is set aside."""
        return self.kind == "stale" or self.is_damaged

    def describe(self, num_steps: int) -> str:
        """In words, for a table."""
        step = f"step {self.step} of {num_steps}"
        words = {
            "running": f"running, {step}",
            "stopped": f"stopped at {step}",
            "missing": "not started",
            "broken": f"broken at {step}",
        }
        told = words.get(self.kind, self.kind)
        return f"{told}: {self.detail}" if self.detail else told


@dataclass(frozen=True)
class Record:
    """What `run` notes about a run in its directory."""

    started: float
    """Seconds since 1970."""
    exit_code: int | None = None
    """None while it goes on."""
    seconds: float = 0.0
    """Of all its parts, starts and saves included."""


def read_record(directory: Path) -> Record | None:
    """The note in a run's directory; None where there is none that can be read."""
    try:
        found = json.loads((directory / RECORD_FILE).read_text(encoding="utf-8"))
        return Record(float(found["started"]), found["exit_code"], float(found["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(directory: Path, record: Record) -> None:
    """Whole or not at all."""
    write_aside(
        directory / RECORD_FILE,
        json.dumps(
            {
                "started": record.started,
                "exit_code": record.exit_code,
                "seconds": round(record.seconds, 1),
            }
        ),
    )


def write_aside(path: Path, text: str) -> None:
    """A file that others read while it is written: whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason_of(error)}") from None


@contextmanager
def study_lock(output: Path) -> Iterator[None]:
    """Held by the one process that runs the study here; the system lets go of it if that dies.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK_FILE).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {reason_of(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{output}: another process runs this study; wait for it, or stop it"
            ) from None
        yield


def is_being_run(output: Path) -> bool:
    """Whether a process of this machine runs the study now."""
    try:
        with (output / LOCK_FILE).open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def state_of(run: StudyRun, *, being_run: bool = False) -> RunState:
    """By the run's directory alone; `being_run`: whether a process runs the study here."""
    directory = run.directory
    step = last_step(directory)
    if not (directory / CONFIG_FILE).is_file():
        record = read_record(directory)
        if record is None:
            return RunState("missing")
        return _unfinished(directory, record, step, being_run)
    record = read_record(directory)
    changed = changed_options(run)
    if changed:
        return RunState("stale", step, f"{', '.join(changed)} changed since it was run")
    if (record is not None and record.exit_code == 0) or _saved_step(directory) == run.num_steps:
        problem = metrics_problem(directory, run.num_steps)
        if problem is not None:
            return RunState("broken", step, problem, is_damaged=True)
        return RunState("finished", step)
    return _unfinished(directory, record, step, being_run)


def last_step(directory: Path) -> int:
    """The last step in a run's metrics; 0 where there is none."""
    path = directory / METRICS_FILE
    try:
        steps = [entry["step"] for _, entry in whole_lines(path) if STEP_METRIC in entry]
    except OSError:
        return 0
    return max(steps, default=0)


def metrics_problem(directory: Path, num_steps: int) -> str | None:
    """Why nothing can be said of a run that has ended: file, line and reason; None where it can.

    A run that goes on after a kill drops the line that was torn, so at its end all can be read.
    """
    path = directory / METRICS_FILE
    steps: set[int] = set()
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                entry = _entry(line)
                if isinstance(entry, str):
                    return f"{path}:{number}: {entry}"
                if STEP_METRIC in entry:
                    steps.add(entry["step"])
    except OSError as error:
        return f"{path}: cannot be read: {reason_of(error)}"
    missing = set(range(1, num_steps + 1)) - steps
    if missing:
        return f"{path}: {len(missing)} of {num_steps} steps are missing, such as {min(missing)}"
    return None


def _entry(line: str) -> dict[str, Any] | str:
    """A line of metrics, or what is wrong with it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return "expected metrics of a step, with `step`"
    return entry


def changed_options(run: StudyRun) -> list[str]:
    """Options that the directory's run was made with and the study has otherwise now."""
    try:
        found = load_config(run.directory / CONFIG_FILE)
    except UserError:
        return ["the configuration (it cannot be read any more)"]
    ignored = (*_NO_MATTER, "model") if run.missing else _NO_MATTER
    return _differences(_plain(found, ignored), _plain(run.config, ignored))


def set_aside(directory: Path) -> Path:
    """Make room for a run that is to be made anew; returns where the old one is."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old_{number}")).exists():
        number += 1
    directory.rename(aside)
    return aside


def _unfinished(directory: Path, record: Record | None, step: int, being_run: bool) -> RunState:
    if record is None:
        return RunState("stopped", step)
    if record.exit_code is None:
        return RunState("running" if being_run else "stopped", step)
    if record.exit_code in (0, 75, 130, 143):
        return RunState("stopped", step)
    return RunState("broken", step, f"exit code {record.exit_code}, see {directory / OUTPUT_FILE}")


def _saved_step(directory: Path) -> int | None:
    """Step of the newest checkpoint: a run saves after its last step, whatever else it does."""
    try:
        name = (directory / "checkpoints" / LATEST_FILE).read_text(encoding="utf-8").strip()
        return int(name.removeprefix("step_"))
    except (OSError, ValueError):
        return None


def _plain(config: Config, ignored: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in config.model_dump(mode="json").items() if k not in ignored}


def _differences(one: Any, other: Any, key: str = "") -> list[str]:
    """Dotted keys under which two sets of options differ."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [key]
    found = []
    for name in sorted({*one, *other}):
        below = f"{key}.{name}" if key else name
        found += _differences(one.get(name), other.get(name), below)
    return found


def now() -> float:
    """Seconds since 1970."""
    return time.time()
