"""Under a real Slurm: who launched what; and however a signal comes, all save and leave with 75.

Any cluster with two idle nodes will do, if this tree is on its shared file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mpi_cases import KINDS, OPTIONS, find_mpirun
from run_cases import PATIENCE_SECONDS, PIPELINE, REPOSITORY, metrics_of, write_room

NUM_NODES = 2
# What a batch script has to do so that a signal to it alone reaches the run.
BATCH = """#!/bin/bash
srun {job} &
step=$!
trap 'kill -USR1 $step' USR1
wait $step; code=$?
# A signal that the shell catches ends its first wait.
while kill -0 $step 2>/dev/null; do wait $step; code=$?; done
echo $code > code.part && mv code.part code
"""


def why_not() -> str:
    """Why these tests can't run here; empty if they can."""
    if shutil.which("sinfo") is None:
        return "no Slurm here: sinfo is not installed"
    shown = subprocess.run(
        ["sinfo", "--noheader", "--states=idle", "--format=%D"],
        capture_output=True,
        text=True,
        check=False,
    )
    idle = sum(int(line) for line in shown.stdout.split() if line.isdigit())
    if shown.returncode != 0 or idle < NUM_NODES:
        return f"sinfo finds {idle} idle nodes, {NUM_NODES} are needed {shown.stderr[:80]!r}"
    return ""


pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return directory


def job(run_dir: str) -> list[str]:
    """A run of two stages with more steps than are ever reached."""
    quick = ("evaluation.interval=0", "data.eval_path=null", "checkpoint.interval=0")
    sizes = (PIPELINE, "train.num_steps=100000", f"run_dir={run_dir}")
    return [sys.executable, "-m", "nested_reft_mcore", "train", "config.yaml", *sizes, *quick]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def name() -> Iterator[str]:
    """A name for the jobs of one test; what is left of them is cancelled."""
    name = f"nested-{uuid.uuid4().hex[:8]}"
    yield name
    subprocess.run(["scancel", f"--name={name}"], check=False)


def signal_job(name: str, *options: str) -> None:
    shown = subprocess.run(
        ["squeue", "--noheader", f"--name={name}", "--format=%A"],
        capture_output=True,
        text=True,
        check=True,
    )
    subprocess.run(["scancel", *options, shown.stdout.strip()], check=True)


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in metrics_of(run_dir)), default=-1)


def wait_for(condition: Callable[[], bool], say: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.05)


def check_saved(run_dir: Path) -> int:
    """The step that the run was stopped at."""
    saved = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert (run_dir / "requeue").read_text() == f"step {saved}\n"
    (run_dir / "requeue").unlink()
    return saved


def test_a_step_stops_and_the_same_command_goes_on(room: Path, name: str) -> None:
    run_dir, saved = room / "step", 0
    for number in ("USR1", "TERM"):
        before = last_step(run_dir)
        sizes = (f"--nodes={NUM_NODES}", f"--ntasks={NUM_NODES}", f"--job-name={name}")
        process = subprocess.Popen(
            ["srun", *sizes, *job("step")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=room,
            env=environment(),
        )
        wait_for(lambda before=before: last_step(run_dir) > before, lambda: f"{run_dir}: no step")
        signal_job(name, f"--signal={number}")
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 75, out
        # Slurm names every task that left with a code of its own.
        assert out.count("Exited with exit code 75") == NUM_NODES, out
        former, saved = saved, check_saved(run_dir)
        assert saved > former
    lines = [line["step"] for line in metrics_of(run_dir) if "actor/lr" in line]
    assert lines == list(range(1, saved + 1))


@pytest.mark.parametrize("reach", ["--batch", "--full"])
def test_a_batch_script_passes_the_signal_on(room: Path, name: str, reach: str) -> None:
    """To the script alone, as `#SBATCH --signal=B:USR1` sends it, and to everybody."""
    run_name = reach.strip("-")
    directory = room / f"of_{run_name}"
    directory.mkdir()
    for path in ("task", "config.yaml"):
        (directory / path).symlink_to(room / path)
    (directory / "job.sh").write_text(BATCH.format(job=" ".join(job("run"))))
    sizes = (f"--nodes={NUM_NODES}", f"--ntasks={NUM_NODES}", f"--job-name={name}")
    subprocess.run(
        ["sbatch", "--output=job.log", *sizes, "job.sh"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=directory,
        env=environment(),
    )
    log = directory / "job.log"
    wait_for(lambda: last_step(directory / "run") > 0, log.read_text)
    signal_job(name, reach, "--signal=USR1")
    wait_for((directory / "code").exists, log.read_text)
    assert (directory / "code").read_text() == "75\n", log.read_text()
    assert check_saved(directory / "run") > 0


DISCOVER = """
import os
from nested_reft_mcore.launch.ranks import discover_ranks
ranks = discover_ranks(os.environ)
print(ranks.launcher, ranks.rank, ranks.world_size, flush=True)
"""
MEET = """
import os, sys
from nested_reft_mcore.launch.mpi import MpiWorld
from nested_reft_mcore.launch.ranks import discover_ranks
ranks = discover_ranks(os.environ)
world = MpiWorld(ranks)
import torch.distributed as dist
os.environ["MASTER_ADDR"] = world.ranks.master_addr
os.environ["MASTER_PORT"] = str(world.ranks.master_port)
dist.init_process_group("gloo", rank=world.ranks.rank, world_size=world.ranks.world_size)
dist.barrier()
# mpirun may mix what two ranks print.
met = f"{ranks.launcher} {ranks.rank} {ranks.world_size}"
with open(f"{sys.argv[1]}.{os.getpid()}", "w") as file:
    file.write(met)
dist.destroy_process_group()
os._exit(world.part(0))
"""


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_a_task_of_srun_is_not_taken_for_one_of_mpirun(room: Path, mpi: str) -> None:
    """pmi2 has PMI_RANK and PMI_SIZE in the environment, as MPICH's mpirun has."""
    shown = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, check=False)
    if mpi not in (shown.stdout + shown.stderr).split():
        pytest.skip(f"this Slurm has no --mpi={mpi}")
    sizes = (f"--nodes={NUM_NODES}", f"--ntasks={NUM_NODES}", f"--mpi={mpi}")
    done = subprocess.run(
        ["srun", *sizes, sys.executable, "-c", DISCOVER],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert sorted(done.stdout.splitlines()) == ["srun 0 2", "srun 1 2"]


@pytest.mark.parametrize("kind", KINDS)
def test_mpirun_in_a_job_wins_over_the_step_of_its_daemons(room: Path, kind: str) -> None:
    """The processes are on two nodes, so their meeting point is not the loopback address."""
    mpirun = find_mpirun(kind)
    if isinstance(mpirun, str):
        pytest.skip(mpirun)
    (room / "meet.py").write_text(MEET)
    options = " ".join(OPTIONS[kind]).replace("--oversubscribe", "")
    command = f"{mpirun.command} {options} -n {NUM_NODES} {sys.executable} meet.py met_{kind}"
    (room / "meet.sh").write_text(f"#!/bin/bash\n{command}\n")
    sizes = (f"--nodes={NUM_NODES}", f"--ntasks={NUM_NODES}")
    log = room / f"meet.{kind}.log"
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={log}", *sizes, "meet.sh"],
        cwd=room,
        stdout=subprocess.DEVNULL,
        check=False,
        env={**environment(), **mpirun.environment()},
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, log.read_text()
    told = [path.read_text() for path in room.glob(f"met_{kind}.*")]
    assert sorted(told) == ["mpirun 0 2", "mpirun 1 2"], log.read_text()
