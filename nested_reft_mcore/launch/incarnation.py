"""Whose a run directory is: one start of a job at a time, and the newest start wins."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nested_reft_mcore.config.errors import UserError

INCARNATION_FILE = "incarnation.json"


class SupersededError(Exception):
    """Another start has taken the run directory over; this one must not write any more."""


@dataclass(frozen=True)
class Incarnation:
    """One start of a job."""

    job: str
    """Slurm's job id, torchrun's run id and agent, or host and process id."""
    restart: int
    """How often the scheduler or torchrun has started the job before."""
    host: str
    pid: int
    started: float
    """Seconds since 1970."""
    token: str
    """Random: no two starts share it."""

    def describe(self) -> str:
        """For messages."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return (
            f"job {self.job}, restart {self.restart}, process {self.pid} on {self.host}, "
            f"started {moment}"
        )


def this_incarnation(environ: Mapping[str, str] = os.environ) -> Incarnation:
    """This start, by what Slurm or torchrun says of it. Each call draws a new token."""
    host, pid = socket.gethostname(), os.getpid()
    if "SLURM_JOB_ID" in environ:
        job, restart = f"slurm-{environ['SLURM_JOB_ID']}", environ.get("SLURM_RESTART_COUNT")
    elif "TORCHELASTIC_RUN_ID" in environ:
        # Run ids are reused, and often are just "none"; the agent that counts restarts is one.
        job = f"torchrun-{environ['TORCHELASTIC_RUN_ID']}-{host}-{os.getppid()}"
        restart = environ.get("TORCHELASTIC_RESTART_COUNT")
    else:
        job, restart = f"{host}-{pid}", None
    count = int(restart) if restart and restart.isdigit() else 0
    return Incarnation(job, count, host, pid, time.time(), secrets.token_hex(4))


def take_over(run_dir: Path, mine: Incarnation) -> Incarnation | None:
    """Make the run directory this start's; returns whose it was.

    The former owner, if it is alive, finds out before it writes again (`check_owner`).

    Raises:
        UserError: it belongs to a later start of the same job, so this one is a straggler; or it
            cannot be written to.
    """
    former = owner(run_dir)
    if former is not None and former.job == mine.job and former.restart > mine.restart:
        raise UserError(
            f"{run_dir}: belongs to {former.describe()}; this is restart {mine.restart} of the "
            f"same job and gives way; remove {run_dir / INCARNATION_FILE} if that one is gone"
        )
    path = run_dir / INCARNATION_FILE
    # Two starts at once write different files, and the later rename wins.
    aside = path.with_name(f".{path.name}.{mine.token}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(mine), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return former


def owner(run_dir: Path) -> Incarnation | None:
    """Whose the run directory is; nobody's where the file is missing or means nothing."""
    try:
        content = json.loads((run_dir / INCARNATION_FILE).read_text(encoding="utf-8"))
        return Incarnation(**content)
    except (OSError, ValueError, TypeError):
        return None


def check_owner(run_dir: Path, mine: Incarnation) -> None:
    """Make sure that nobody has taken the run directory over.

    Raises:
        SupersededError: names the new owner.
    """
    now = owner(run_dir)
    if now is not None and now.token != mine.token:
        raise SupersededError(
            f"{run_dir} now belongs to {now.describe()}; this start stops and writes nothing more"
        )
