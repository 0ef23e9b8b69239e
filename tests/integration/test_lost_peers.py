"""A process that dies or hangs ends the job with 4, soon, and with the reason; slowness does not.

Every run here is real: two or more processes of the command line, killed or stopped from outside.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from run_cases import (
    LAUNCH_VARIABLES,
    PATIENCE_SECONDS,
    PIPELINE,
    REPOSITORY,
    family,
    finish,
    metrics_of,
    rank_of,
    start,
    wait_until,
    write_room,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DEADLINE_SECONDS = 8
HOST = re.escape(socket.gethostname())
ENDLESS = (
    *("train", "config.yaml", PIPELINE, "train.num_steps=100000", "logging.tensorboard=false"),
    *("evaluation.interval=0", "data.eval_path=null", "checkpoint.interval=1"),
    *(f"launch.peer_deadline_seconds={DEADLINE_SECONDS}", "checkpoint.requeue_on_lost_peer=true"),
)


LOSSES = [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return directory


@pytest.fixture(scope="module")
def drills(room: Path) -> Iterator[dict[object, Future[None]]]:
    """All of them side by side: they mostly wait."""
    with ThreadPoolExecutor() as pool:
        futures: dict[object, Future[None]] = {
            loss: pool.submit(lose, room, *loss) for loss in LOSSES
        }
        yield futures | {"torchrun": pool.submit(lose_under_torchrun, room)}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_process_ends_the_job(drills, loss: tuple[int, signal.Signals]) -> None:
    drills[loss].result()


def test_under_torchrun_the_others_know_it_too(drills) -> None:
    drills["torchrun"].result()


def lose(room: Path, rank: int, number: signal.Signals) -> None:
    name = f"lost_{rank}_{number.name}"
    run_dir = room / name
    process = start(room, *ENDLESS, f"run_dir={name}")
    wait_until(process, lambda: len(metrics_of(run_dir)) > 2)
    everybody = family(process)
    victim = rank_of(process, rank)
    began = time.monotonic()
    victim.send_signal(number)
    code, _, err = finish(process)
    elapsed = time.monotonic() - began
    assert code == 4, err
    assert elapsed < DEADLINE_SECONDS + 30, err
    assert not psutil.wait_procs(everybody, timeout=10)[1]
    # Who was lost, and how; what the other one was doing, and at which step.
    how = "the process died" if number == signal.SIGKILL else "no sign of life for"
    assert re.search(rf"\[rank {rank} on {HOST}\] was lost: {how}", err), err
    assert re.search(rf"  rank {1 - rank} on {HOST}: in step \d+.*\(\w+\.\w+:\d+\)", err), err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    reason = "killed by SIGKILL" if number == signal.SIGKILL else "it hung, and was killed"
    assert re.fullmatch(rf"rank {rank} on {HOST} failed first \({reason}\); logs: \S+", last), err
    # The last checkpoint is whole, and the job asks to go on from it.
    saved = int(re.fullmatch(r"step (\d+)\n", (run_dir / "requeue").read_text()).group(1))
    assert saved >= 1
    assert (run_dir / "checkpoints" / f"step_{saved:08d}" / "manifest.json").exists()
    # The survivor's own log has it too, with rank and host in each line.
    log = (run_dir / "logs" / f"rank_{1 - rank:05d}.log").read_text().splitlines()
    assert all(re.match(rf"\S+ \S+ rank {1 - rank} {HOST} [A-Z]+ ", line) for line in log), log
    assert any("was lost" in line for line in log), log


def lose_under_torchrun(room: Path) -> None:
    """Rank 0 dies, and with it the hub. torchrun answers 1 whatever happens."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    job = ("-m", "nested_reft_mcore", *ENDLESS, "run_dir=torchrun")
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    process = subprocess.Popen(
        [sys.executable, *command, *job],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=room,
        env=clean | {"PYTHONPATH": str(REPOSITORY)},
    )
    run_dir = room / "torchrun"
    wait_until(process, lambda: len(metrics_of(run_dir)) > 2)
    everybody = family(process)
    rank_of(process, 0).kill()
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, err
    assert not psutil.wait_procs(everybody, timeout=10)[1]
    assert re.search(rf"\[rank 0 on {HOST}\] was lost: the process died", err), err
    assert re.search(rf"  rank 1 on {HOST}: in step \d+", err), err
    assert (run_dir / "requeue").exists()


SLOW_REWARD = """
import time
from pathlib import Path

def reward(item):
    if Path("be_slow").exists():
        Path("be_slow").unlink()
        time.sleep(11)
    return 1.0
"""


def test_slow_is_not_lost(room: Path, drills) -> None:
    """A phase of twice the deadline, in which the other process waits, goes through.

    The run is that of the first drill, which goes on from its last checkpoint.
    """
    name, deadline = "lost_1_SIGKILL", 5
    drills[LOSSES[0]].result()
    run_dir = room / name
    saved = int((run_dir / "requeue").read_text().split()[1])
    (room / "slow_reward.py").write_text(SLOW_REWARD)
    (room / "be_slow").touch()
    patience = (f"launch.peer_deadline_seconds={deadline}", "reward.deadline_seconds=60")
    reward = "reward.name=slow_reward:reward"
    process = start(room, *ENDLESS, f"run_dir={name}", *patience, reward, more_path=str(room))
    wait_until(process, lambda: metrics_of(run_dir)[-1]["step"] > saved + 1)
    assert not (run_dir / "requeue").exists()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert f"going on after step {saved}" in err
    assert "was lost" not in err
    lines = metrics_of(run_dir)
    assert any(line.get("timing_s/reward", 0) > 2 * deadline for line in lines)
    assert all(line.get("reward/timeouts", 0) == 0 for line in lines)
