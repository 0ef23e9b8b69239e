"""What Slurm knows about the runs of a study that were submitted."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.studies.states import RunState

SUBMISSIONS = "submissions"
"""In the study's output: a file for each array that was submitted, written once."""
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
_GOING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_SECONDS = 30


@dataclass(frozen=True)
class Task:
    """A run as a task of a job array."""

    job: str
    index: int
    submitted: float
    """Seconds since 1970."""
    log: str
    slurm_state: str | None
    """Such as `RUNNING`; None where Slurm has forgotten it."""

    @property
    def is_active(self) -> bool:
        """Whether Slurm runs it or will."""
        return self.slurm_state in (*_WAITING, *_GOING)

    def state(self, step: int) -> RunState:
        """Of the run, which its directory does not call finished."""
        where = f"{self.job}_{self.index}"
        if self.slurm_state in _GOING:
            return RunState("running", step, f"job {where}")
        if self.slurm_state in _WAITING:
            return RunState("queued", step, f"job {where}")
        ended = (
            "ended, and Slurm does not say how" if self.slurm_state is None else self.slurm_state
        )
        return RunState("broken", step, f"job {where} {ended}, see {self.log}")


def queue_states(output: Path) -> dict[str, Task]:
    """The newest task of each run that was ever submitted, by the run's name."""
    submissions = read_submissions(output)
    known = slurm_states([s["job"] for s in submissions])
    found: dict[str, Task] = {}
    for submission in submissions:
        job = submission["job"]
        for index, name in enumerate(submission["runs"]):
            log = str(submission["log"]).replace("%A", job).replace("%a", str(index))
            state = known.get(f"{job}_{index}")
            found[name] = Task(job, index, float(submission["submitted"]), log, state)
    return found


def read_submissions(output: Path) -> list[dict[str, Any]]:
    """What `submit` has noted, oldest first; notes that cannot be read are left out."""
    found = []
    for path in sorted((output / SUBMISSIONS).glob("*.json")):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            found.append({key: entry[key] for key in ("job", "runs", "log", "submitted")})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def slurm_states(jobs: list[str]) -> dict[str, str]:
    """The state of every task of these jobs, by `JOB_INDEX`, as far as Slurm still knows it."""
    if not jobs:
        return {}
    listed = ",".join(jobs)
    found: dict[str, str] = {}
    ended = ["--noheader", "--parsable2", "--allocations", "--array", "--format=JobID,State"]
    for line in _call("sacct", *ended, f"--jobs={listed}"):
        name, _, state = line.partition("|")
        found[name] = state.split()[0] if state.strip() else ""
    for job in jobs:
        # One by one: squeue fails for a job that it has forgotten.
        options = ("--noheader", "--array", "--states=all", "--format=%i|%T")
        for line in _call("squeue", *options, f"--jobs={job}"):
            name, _, state = line.partition("|")
            found[name] = state.strip()
    return found


def _call(program: str, *arguments: str) -> list[str]:
    """Lines of a command's output; none where it fails or is not there."""
    if shutil.which(program) is None:
        return []
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
