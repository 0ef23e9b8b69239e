"""Asked to stop: the deadline for a process that is stuck, and whole runs under torchrun.

`test_train_cli.py` stops a run that was started alone, `tests/slurm` one under srun.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from run_cases import (
    LAUNCH_VARIABLES,
    PATIENCE_SECONDS,
    PIPELINE,
    REPOSITORY,
    metrics_of,
    wait_until,
    write_room,
)

from nested_reft_mcore.launch.signals import STOP_SIGNALS, StopSignals

SCRIPT = """
import ctypes, os, signal, sys, time
from pathlib import Path
from nested_reft_mcore.launch import signals
from nested_reft_mcore.launch.signals import StopSignals

here, mode = Path(__file__).parent, sys.argv[1]

def note(name, text=""):
    (here / f"{name}.part").write_text(text)
    (here / f"{name}.part").rename(here / name)

def hang():
    # Locking a mutex twice: no signal ever makes this call return, and no Python handler runs.
    mutex = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    note("stuck")
    libc.pthread_mutex_lock(mutex)
    note("came back")

def ask():
    os.kill(os.getpid(), signal.SIGTERM)
    return time.monotonic()

def stuck(stop):
    stop.arm_deadline(1.0, lambda: note("requeue"))
    hang()

def asked_before(stop):
    start = ask()
    time.sleep(1.5)
    stop.arm_deadline(2.0, lambda: note("elapsed", str(time.monotonic() - start)))
    hang()

def last_words_hang(stop):
    signals._LAST_WORDS_SECONDS = 0.3
    stop.arm_deadline(0.1, lambda: time.sleep(600))
    ask()
    hang()

def last_words_fail(stop):
    stop.arm_deadline(0.1, lambda: 1 / 0)
    ask()
    hang()

def other_rank(stop):
    start = time.monotonic()
    stop.arm_deadline(0.1, lambda: note("elapsed", str(time.monotonic() - start)))
    ask()
    hang()

def disarmed(stop):
    stop.arm_deadline(0.1, lambda: note("requeue"))
    stop.arm_deadline(0, lambda: note("requeue"))
    ask()
    time.sleep(0.6)

def forked(stop):
    stop.arm_deadline(0.1, lambda: note("requeue"))
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.6)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    note("asked", str(stop.requested))

with StopSignals() as stop:
    globals()[mode](stop)
"""


def start(directory: Path, mode: str, **more: str) -> subprocess.Popen[str]:
    script = directory / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), mode],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment() | more,
    )


def clean_environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return clean | {"PYTHONPATH": path}


def run(directory: Path, mode: str, **more: str) -> tuple[int, str]:
    return finish(start(directory, mode, **more))


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("still there") from None
    return process.returncode, err


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_process_that_is_stuck_in_c_leaves_at_the_deadline(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, "stuck")
    wait_until(process, (tmp_path / "stuck").exists)
    asked_at = time.monotonic()
    process.send_signal(number)
    code, err = finish(process)
    assert code == 75, err
    assert time.monotonic() - asked_at >= 1.0
    assert (tmp_path / "requeue").exists()
    assert not (tmp_path / "came back").exists()
    assert f"{number.name}: not done 1 s later" in err
    assert "the last checkpoint stands" in err


def test_a_signal_before_arming_counts_from_its_arrival(tmp_path: Path) -> None:
    assert run(tmp_path, "asked_before")[0] == 75
    # From arming it would be 3.5.
    assert 2.0 <= float((tmp_path / "elapsed").read_text()) < 3.4


def test_last_words_that_hang_or_fail_change_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "last_words_hang")[0] == 75
    code, err = run(tmp_path, "last_words_fail")
    assert code == 75
    assert "ZeroDivisionError" in err


def test_other_ranks_give_rank_0_a_head_start(tmp_path: Path) -> None:
    launch = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert run(tmp_path, "other_rank", RANK="1", **launch)[0] == 75
    assert float((tmp_path / "elapsed").read_text()) >= 2.1


def test_disarmed_is_disarmed(tmp_path: Path) -> None:
    code, err = run(tmp_path, "disarmed")
    assert code == 0, err
    assert not (tmp_path / "requeue").exists()


def test_a_signal_to_a_forked_child_is_not_this_process_s(tmp_path: Path) -> None:
    code, err = run(tmp_path, "forked")
    assert code == 0, err
    assert (tmp_path / "asked").read_text() == "False"


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_whoever_leaves_in_time_leaves_nothing_behind() -> None:
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    threads, descriptors = threading.active_count(), num_descriptors()
    asked: list[str] = []
    with StopSignals() as stop:
        stop.arm_deadline(0.3, lambda: asked.append("too late"))
        assert threading.active_count() == threads + 1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == signal.SIGUSR1
    time.sleep(0.5)
    assert not asked
    assert signal.set_wakeup_fd(-1) == -1
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert (threading.active_count(), num_descriptors()) == (threads, descriptors)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_impossible_deadlines(seconds: float) -> None:
    with StopSignals() as stop, pytest.raises(ValueError, match="seconds="):
        stop.arm_deadline(seconds, lambda: None)


GLOO = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from nested_reft_mcore.launch.ranks import discover_ranks
from nested_reft_mcore.launch.signals import StopSignals

here, ranks = Path(__file__).parent, discover_ranks(os.environ)
with StopSignals() as stop:
    dist.init_process_group("gloo", rank=ranks.rank, world_size=2)
    dist.barrier()
    stop.arm_deadline(1.0, lambda: (here / f"requeue.{ranks.rank}").touch())
    (here / f"up.{ranks.rank}").touch()
    if ranks.rank == 0:
        dist.barrier()
    time.sleep(600)
"""


@pytest.mark.distributed
def test_a_collective_whose_peer_does_not_come_ends_at_the_deadline(tmp_path: Path) -> None:
    """Started alone: the launcher forwards the signal and answers 75."""
    script = tmp_path / "script.py"
    script.write_text(GLOO)
    launcher = (
        "import sys; from nested_reft_mcore.launch.spawn import run_local; "
        "sys.exit(run_local(sys.argv[1:], 2, command=[sys.executable]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    wait_until(process, lambda: all((tmp_path / f"up.{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert code == 75, err
    assert all((tmp_path / f"requeue.{rank}").exists() for rank in range(2))


def torchrun(room: Path, *options: str) -> subprocess.Popen[str]:
    """A run of two stages with more steps than are ever reached."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options)
    job = ("-m", "nested_reft_mcore", "train", "config.yaml", PIPELINE, "train.num_steps=100000")
    quick = ("evaluation.interval=0", "data.eval_path=null", "checkpoint.interval=0")
    return subprocess.Popen(
        [sys.executable, *command, *job, *quick],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=room,
        env=clean_environment(),
    )


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in metrics_of(run_dir)), default=-1)


def ask_to_stop(process: subprocess.Popen[str], run_dir: Path, number: signal.Signals) -> int:
    """Signal the agent once its workers have done a step; the step that they saved."""
    (run_dir / "requeue").unlink(missing_ok=True)
    before = last_step(run_dir)
    wait_until(process, lambda: last_step(run_dir) > before)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    code, err = finish(process, PATIENCE_SECONDS)
    # torchrun has no code for this: 1, or its own death by a signal that it does not handle.
    assert code in (1, -number), err
    assert not psutil.wait_procs(workers, timeout=60)[1]
    saved = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert (run_dir / "requeue").read_text() == f"step {saved}\n"
    return saved


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_workers_save_leave_and_go_on(tmp_path: Path) -> None:
    """SIGTERM; SIGUSR1 where torchrun forwards it; and where it dies of it."""
    write_room(tmp_path)
    forwarding = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    starts = (
        (signal.SIGTERM, ()),
        (signal.SIGUSR1, (forwarding,)),
        (signal.SIGUSR1, ()),
    )
    saved = 0
    for number, options in starts:
        former, saved = saved, ask_to_stop(torchrun(tmp_path, *options), tmp_path / "run", number)
        # Each start goes on from where the one before stopped.
        assert saved > former
    lines = [line["step"] for line in metrics_of(tmp_path / "run") if "actor/lr" in line]
    assert lines == list(range(1, saved + 1))
