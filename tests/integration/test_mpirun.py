"""Real mpiruns, of Open MPI and of MPICH: they meet, stop, fail and end as one.

`make mpi` puts both where these tests look first; an mpirun on the PATH will do as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hf_cases import HfCase, write_model
from run_cases import LAUNCH_VARIABLES, REPOSITORY

pytestmark = pytest.mark.distributed
KINDS = ("openmpi", "mpich")
SIGNATURES = {"openmpi": ("open mpi", "openrte", "prrte"), "mpich": ("hydra", "mpich")}
# As root, with more processes than cores, without pinning all of them to the first core.
OPTIONS = {
    "openmpi": ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
    "mpich": (),
}

SCRIPT = """
import datetime, os, sys, time
from pathlib import Path
from nested_reft_mcore.cli.entry import leave
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.ranks import discover_ranks
from nested_reft_mcore.launch.signals import StopSignals

here, mode = Path(__file__).parent, sys.argv[1]
ranks = discover_ranks(os.environ)
rank = ranks.rank if ranks else -1

def note(name, text=""):
    (here / f"{name}.{rank}.part").write_text(text)
    (here / f"{name}.{rank}.part").rename(here / f"{name}.{rank}")

def meet():
    import torch.distributed as dist
    from nested_reft_mcore.launch.mpi import MpiWorld
    world = MpiWorld(ranks)
    os.environ["MASTER_ADDR"] = world.ranks.master_addr
    os.environ["MASTER_PORT"] = str(world.ranks.master_port)
    size = world.ranks.world_size
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = [None] * size
    dist.all_gather_object(found, (rank, world.ranks.local_rank, world.ranks.local_world_size))
    note("met", repr((found, world.ranks.launcher)))
    return world, dist

def stop():
    with StopSignals() as asked:
        world, dist = meet()
        while not asked.requested:
            time.sleep(0.01)
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            # The others are done: mpirun must not end this process meanwhile.
            time.sleep(1.0)
            note("saved", asked.received.name)
        return world.part(75)

def die():
    world, dist = meet()
    if rank == 1:
        time.sleep(0.5)
        os._exit(7)
    note("pid", str(os.getpid()))
    time.sleep(600)

def refuse():
    if rank == 0:
        time.sleep(0.5)
    raise UserError("both find this")

def alone():
    from nested_reft_mcore.launch.spawn import run_local
    note("bare", repr(ranks))
    return run_local([__file__, "child"], 2, command=[sys.executable])

def child():
    import torch.distributed as dist
    dist.init_process_group("gloo", rank=rank, world_size=ranks.world_size)
    dist.barrier()
    note("child", repr((ranks.launcher, ranks.world_size)))
    dist.destroy_process_group()
    return 0

modes = {"stop": stop, "die": die, "refuse": refuse, "alone": alone, "child": child, "meet": meet}
leave(modes[mode])
"""


@dataclass(frozen=True)
class Mpirun:
    kind: str
    command: str
    libraries: str
    """A directory for LD_LIBRARY_PATH; may be empty."""

    def environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
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


@pytest.fixture(scope="module", params=KINDS)
def mpirun(request: pytest.FixtureRequest) -> Mpirun:
    found = find_mpirun(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; a zombie has ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def wait_for(process: subprocess.Popen[str], *paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(finish(process, 5))
        time.sleep(0.02)


def test_a_tool_splits_its_work_over_the_ranks(mpirun: Mpirun, tmp_path: Path) -> None:
    write_model(HfCase("qwen2", untied=False), tmp_path / "hf")
    tool = str(REPOSITORY / "tools" / "convert_hf_to_mcore.py")
    target = tmp_path / "checkpoint"
    options = ("--hf", str(tmp_path / "hf"), "--output", str(target), "--pipeline-parallel", "2")
    code, out, err = mpirun.run(2, tool, *options, PYTHONWARNINGS="ignore")
    assert code == 0, err
    assert out.count(str(target)) == 1
    writers = {path.name.split("_")[2] for path in target.rglob("__*_*.distcp")}
    assert writers == {"0", "1"}


def test_a_forwarded_signal_stops_all_and_the_code_is_75(mpirun: Mpirun, script: Path) -> None:
    """Also: ranks and nodes are MPI's, and the ranks that are done first don't end the last one."""
    process = mpirun.start(2, str(script), "stop")
    met = [script.parent / f"met.{rank}" for rank in range(2)]
    wait_for(process, *met)
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 75, err
    assert (script.parent / "saved.0").read_text() == "SIGUSR1"
    for path in met:
        assert path.read_text() == repr(([(0, 0, 2), (1, 1, 2)], "mpirun"))


def test_one_failure_ends_all(mpirun: Mpirun, script: Path) -> None:
    start = time.monotonic()
    code, _, err = mpirun.run(2, str(script), "die")
    assert code == 7, err
    assert time.monotonic() - start < 120
    pid = int((script.parent / "pid.0").read_text())
    assert gone(pid)


def test_a_mistake_that_all_find_is_told_by_rank_0(mpirun: Mpirun, script: Path) -> None:
    code, _, err = mpirun.run(2, str(script), "refuse")
    assert code == 2, err
    assert "error: both find this" in err.splitlines()
    assert "Traceback" not in err


def test_one_process_is_a_bare_start_whose_children_are_no_ranks_of_it(
    mpirun: Mpirun, script: Path
) -> None:
    code, _, err = mpirun.run(1, str(script), "alone")
    assert code == 0, err
    assert (script.parent / "bare.-1").read_text() == "None"
    for rank in range(2):
        assert (script.parent / f"child.{rank}").read_text() == "('local', 2)"


def test_without_mpi4py_the_message_says_how_to_get_it(mpirun: Mpirun, script: Path) -> None:
    hidden = "raise ModuleNotFoundError('hidden', name='mpi4py')\n"
    (script.parent / "mpi4py.py").write_text(hidden)
    code, _, err = mpirun.run(2, str(script), "meet")
    assert code == 2, err
    assert "error: mpirun: mpi4py is not installed" in err
    assert "pip install 'nested_reft_mcore[mpi]'" in err
    assert "Traceback" not in err


def test_the_library_of_another_mpi_is_refused(script: Path) -> None:
    """Each process would take itself for rank 0 of 1."""
    hydra, other = find_mpirun("mpich"), find_mpirun("openmpi")
    texts = [reason for reason in (hydra, other) if isinstance(reason, str)]
    if isinstance(hydra, str) or isinstance(other, str):
        pytest.skip("; ".join(texts))
    paths = os.pathsep.join(filter(None, [other.libraries, hydra.libraries]))
    code, _, err = hydra.run(2, str(script), "meet", MPI4PY_MPIABI="openmpi", LD_LIBRARY_PATH=paths)
    assert code == 2, err
    assert "started 2 processes, but mpi4py counts 1: it has loaded Open MPI v" in err
    assert "Traceback" not in err
