"""The mpiruns of this machine, and how to start them.

`make mpi` puts Open MPI and MPICH where this looks first; an mpirun on the PATH will do as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from run_cases import LAUNCH_VARIABLES, REPOSITORY

KINDS = ("openmpi", "mpich")
SIGNATURES = {"openmpi": ("open mpi", "openrte", "prrte"), "mpich": ("hydra", "mpich")}
# As root, with more processes than cores, without pinning all of them to the first core.
OPTIONS = {
    "openmpi": ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
    "mpich": (),
}


@dataclass(frozen=True)
class Mpirun:
    kind: str
    command: str
    libraries: str
    """A directory for LD_LIBRARY_PATH; may be empty."""

    def environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        # The shell that runs the tests may have chosen one.
        clean.pop("MPI4PY_MPIABI", None)
        clean["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        if self.libraries:
            former = os.environ.get("LD_LIBRARY_PATH", "")
            clean["LD_LIBRARY_PATH"] = os.pathsep.join([self.libraries, *filter(None, [former])])
        return clean | more

    def start(self, size: int, *command: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.command, *OPTIONS[self.kind], "-n", str(size), sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(**more),
        )

    def run(self, size: int, *command: str, **more: str) -> tuple[int, str, str]:
        return finish(self.start(size, *command, **more))


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=20)
        raise AssertionError(f"no end after {seconds} seconds:\n{out}\n{err}") from None
    return process.returncode, out, err


def find_mpirun(kind: str) -> Mpirun | str:
    """The mpirun of this kind, or why there is none."""
    ours = Path(sys.prefix) / "mpi" / kind
    found = None
    if (ours / "bin" / "mpirun").exists():
        found = Mpirun(kind, str(ours / "bin" / "mpirun"), str(ours / "lib"))
    for name in (f"mpirun.{kind}", "mpirun"):
        path = shutil.which(name)
        if found is None and path is not None:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            if any(sign in shown.stdout.lower() for sign in SIGNATURES[kind]):
                found = Mpirun(kind, path, "")
    if found is None:
        return f"no mpirun of {kind}: `make mpi` installs one"
    load = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI"
    done = subprocess.run(
        [sys.executable, "-c", load],
        capture_output=True,
        text=True,
        check=False,
        env=found.environment(MPI4PY_MPIABI=kind),
    )
    return found if done.returncode == 0 else f"{kind}: {done.stderr.splitlines()[-1]}"
