"""The shipped scripts, submitted with `sbatch` as a user does, and what became of the jobs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from run_cases import LAUNCH_VARIABLES, REPOSITORY
from slurm_cluster import SlurmCluster

PATIENCE_SECONDS = 480.0
"""Longer than elsewhere: a job that comes back starts several times."""
LOOK_SECONDS = 5.0
"""Between two looks at nodes that may be stuck."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Patience:
    """How long a test waits. Once it was for nothing, the cluster's later tests wait less long."""

    _spent: ClassVar[set[Path]] = set()

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster
        self._start = self._looked = time.monotonic()

    def lasts(self) -> bool:
        """Wait a moment; False once it has been too long."""
        time.sleep(0.1)
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._cluster.free_stuck_nodes()
        most = PATIENCE_SECONDS / (8 if self._cluster.directory in self._spent else 1)
        if now - self._start < most:
            return True
        self._spent.add(self._cluster.directory)
        return False


@dataclass(frozen=True)
class Job:
    """One submitted job."""

    number: str
    log_file: Path
    cluster: SlurmCluster

    @property
    def log(self) -> str:
        """What the job has printed so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def shows(self, name: str) -> str:
        """A field of `scontrol show job`, as `JobState` or `Restarts`."""
        text = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number)
        match = re.search(rf"\b{name}=(\S+)", text)
        return match.group(1) if match else ""

    @property
    def code(self) -> int:
        """The exit code; 0 while it runs."""
        return int(self.shows("ExitCode").split(":")[0])

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait while the job is not over."""
        patience = Patience(self.cluster)
        while not condition():
            over = self.shows("JobState") in ENDED
            assert not over, f"job {self.number} ended without {what}:\n{self.log}"
            assert patience.lasts(), f"job {self.number}: no {what}:\n{self.log}"

    def end(self, code: int = 0) -> str:
        """Wait for the end and check the exit code; what the job has printed."""
        patience = Patience(self.cluster)
        while (state := self.shows("JobState")) not in ENDED:
            assert patience.lasts(), f"job {self.number} is {state}:\n{self.log}"
        assert self.code == code, f"{self.shows('JobState')}:\n{self.log}"
        return self.log

    def wait_for_array(self, condition: Callable[[], bool]) -> None:
        """Wait while any task of this array is not over, and once more after that."""
        patience = Patience(self.cluster)
        while not condition():
            left = self.cluster.call("squeue", "--noheader", f"--jobs={self.number}").strip()
            logs = self.log_file.parent.glob(f"{self.log_file.name}*")
            said = "\n".join(path.read_text() for path in logs)
            assert left or condition(), said
            assert patience.lasts(), said

    def signal(self, *options: str) -> None:
        """`scancel OPTIONS` this job."""
        self.cluster.call("scancel", *options, self.number)


@dataclass
class JobRoom:
    """A working directory of jobs, and an env.sh that says so."""

    directory: Path
    cluster: SlurmCluster
    number: int = field(default=0)

    def __post_init__(self) -> None:
        self.write_site()

    @property
    def config(self) -> str:
        """The file that `write_room` writes."""
        return str(self.directory / "config.yaml")

    def write_site(self, **settings: str) -> None:
        """The site's settings, which a job's environment overrides."""
        fixed = {"WORK_DIR": str(self.directory), "PYTHON": sys.executable}
        lines = [f': "${{{name}:={value}}}"\n' for name, value in (fixed | settings).items()]
        (self.directory / "env.sh").write_text("".join(lines))

    def submit(
        self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str
    ) -> Job:
        """`sbatch OPTIONS slurm/SCRIPT ARGUMENTS` from the project's root."""
        self.number += 1
        log = self.directory / f"{script}.{self.number}.log"
        # Tasks of an array each write their own.
        output = f"{log}.%a" if any(o.startswith("--array") for o in options) else str(log)
        command = ["sbatch", "--parsable", f"--output={output}", *options, f"slurm/{script}"]
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
            env=self._environment() | environment,
        )
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip().split(";")[0], log, self.cluster)

    def _environment(self) -> dict[str, str]:
        env = self.cluster.environment()
        clean = {name: value for name, value in env.items() if name not in LAUNCH_VARIABLES}
        # The scripts themselves say whose package runs.
        clean.pop("PYTHONPATH", None)
        return clean | {"NESTED_REFT_ENV": str(self.directory / "env.sh")}


def sizes(nodes: int, tasks_per_node: int, *more: str) -> tuple[str, ...]:
    """Options of sbatch for so many tasks, of one CPU and one declared GPU each."""
    each = f"--ntasks-per-node={tasks_per_node}"
    return f"--nodes={nodes}", each, f"--gpus-per-node={tasks_per_node}", "--cpus-per-task=1", *more
