"""Real mpiruns, of Open MPI and of MPICH: they meet, stop, fail and end as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hf_cases import HfCase, read_tensors, write_model
from mpi_cases import KINDS, Mpirun, find_mpirun, finish
from run_cases import REPOSITORY

pytestmark = pytest.mark.distributed

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

def differ():
    world, dist = meet()
    dist.destroy_process_group()
    code = world.part(5 if rank == 1 else 0)
    note("code", str(int(code)))
    return code

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

leave(globals()[mode])
"""


@pytest.fixture(scope="module", params=KINDS)
def mpirun(request: pytest.FixtureRequest) -> Mpirun:
    found = find_mpirun(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def any_mpirun() -> Mpirun:
    """For what doesn't depend on the kind."""
    found = [find_mpirun(kind) for kind in KINDS]
    there = [mpirun for mpirun in found if isinstance(mpirun, Mpirun)]
    if not there:
        pytest.skip("; ".join(map(str, found)))
    return there[0]


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


def test_tools_split_their_work_over_the_ranks(mpirun: Mpirun, tmp_path: Path) -> None:
    """To a checkpoint and back, with the same bits."""
    source, checkpoint, back = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "back"
    write_model(HfCase("qwen2", untied=False), source)
    for tool, options in (
        ("convert_hf_to_mcore.py", ("--hf", str(source), "--output", str(checkpoint))),
        ("convert_mcore_to_hf.py", ("--checkpoint", str(checkpoint), "--output", str(back))),
    ):
        path = str(REPOSITORY / "tools" / tool)
        # Port 0 stands for any that is free, and is no place to meet.
        more = {"PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        code, out, err = mpirun.run(2, path, *options, **more)
        assert code == 0, err
        assert out.count(options[-1]) == 1
    assert {path.name for path in checkpoint.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert len(list(back.glob("*.safetensors"))) >= 2
    expected, found = read_tensors(source), read_tensors(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


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


def test_all_leave_with_one_code(any_mpirun: Mpirun, script: Path) -> None:
    code, _, err = any_mpirun.run(2, str(script), "differ")
    assert code == 5, err
    # Who leaves first may end the other before it has noted.
    noted = {path.read_text() for path in script.parent.glob("code.?")}
    assert noted == {"5"}


def test_one_failure_ends_all(mpirun: Mpirun, script: Path) -> None:
    start = time.monotonic()
    code, _, err = mpirun.run(2, str(script), "die")
    assert code == 7, err
    assert time.monotonic() - start < 120
    pid = int((script.parent / "pid.0").read_text())
    assert gone(pid)


def test_a_mistake_that_all_find_is_told_by_rank_0(any_mpirun: Mpirun, script: Path) -> None:
    code, _, err = any_mpirun.run(2, str(script), "refuse")
    assert code == 2, err
    assert "error: both find this" in err.splitlines()
    assert "Traceback" not in err


def test_one_process_is_a_bare_start_whose_children_are_no_ranks_of_it(
    any_mpirun: Mpirun, script: Path
) -> None:
    code, _, err = any_mpirun.run(1, str(script), "alone")
    assert code == 0, err
    assert (script.parent / "bare.-1").read_text() == "None"
    for rank in range(2):
        assert (script.parent / f"child.{rank}").read_text() == "('local', 2)"


def test_without_mpi4py_the_message_says_how_to_get_it(any_mpirun: Mpirun, script: Path) -> None:
    hidden = "raise ModuleNotFoundError('hidden', name='mpi4py')\n"
    (script.parent / "mpi4py.py").write_text(hidden)
    code, _, err = any_mpirun.run(2, str(script), "meet")
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


def test_doctor_names_the_mpi_that_is_loaded(mpirun: Mpirun) -> None:
    code = (
        "from nested_reft_mcore.launch.doctor import check_communication; "
        "print([f for f in check_communication() if f.name == 'MPI'])"
    )
    here = os.pathsep.join([str(Path(mpirun.command).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=mpirun.environment(PATH=here),
    )
    name = {"openmpi": "Open MPI v", "mpich": "MPICH "}[mpirun.kind]
    assert "status='ok'" in done.stdout
    assert f" with {name}" in done.stdout
    if Path(mpirun.command).name == "mpirun":
        assert f"the mpirun of {mpirun.kind} on the PATH" in done.stdout


def test_an_mpi_that_cannot_be_loaded_is_told(any_mpirun: Mpirun, script: Path) -> None:
    code, _, err = any_mpirun.run(2, str(script), "meet", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert code == 2, err
    assert "error: mpirun: mpi4py cannot load the MPI library" in err
    assert "/nowhere/libmpi.so" in err
    assert "Traceback" not in err
