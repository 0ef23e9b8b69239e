"""The disk is full, a data file is spoilt, rewards cannot be judged: the run saves, or says why."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from run_cases import PIPELINE, finish, metrics_of, rank_of, start, wait_until, write_room

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

HOST = re.escape(socket.gethostname())
REPLICAS = "parallel.data_parallel_size=2"
QUICK = ("evaluation.interval=0", "data.eval_path=null", "logging.tensorboard=false")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return directory


@pytest.fixture(scope="module")
def faults(room: Path) -> Iterator[dict[str, Future[None]]]:
    """All of them side by side: they mostly wait."""
    drills = (no_rollouts, full_disk, full_at_stop, full_for_one, spoilt_line, dead_rewards)
    with ThreadPoolExecutor() as pool:
        yield {drill.__name__: pool.submit(drill, room) for drill in drills}


@pytest.mark.parametrize(
    "name",
    ["no_rollouts", "full_disk", "full_at_stop", "full_for_one", "spoilt_line", "dead_rewards"],
)
def test_the_run_saves_and_stops_or_goes_on(faults: dict[str, Future[None]], name: str) -> None:
    faults[name].result()


def train(name: str, *more: str) -> tuple[str, ...]:
    return ("train", "config.yaml", f"run_dir={name}", *QUICK, *more)


def saved_steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def no_rollouts(room: Path) -> None:
    """The second replica's: both processes save the step, and the first one says who and what."""
    run_dir = room / "rollouts"
    # Whatever the user may do, a directory is not replaced by a file.
    (run_dir / "rollouts" / "step_000002.dp1.jsonl" / "taken").mkdir(parents=True)
    code, _, err = finish(start(room, *train("rollouts", REPLICAS, "checkpoint.interval=0")))
    assert code == 1, err
    saved, trouble, *_ = [line for line in err.splitlines() if "ERROR" in line]
    assert saved.endswith("stopped: saved after step 3; the same command goes on from there")
    assert re.search(rf"\[rank 1 on {HOST}\] .*step_000002.*cannot be written: ", trouble), err
    assert "Traceback" not in err
    assert saved_steps(run_dir) == ["step_00000003"]
    (run_dir / "rollouts" / "step_000002.dp1.jsonl" / "taken").rmdir()
    (run_dir / "rollouts" / "step_000002.dp1.jsonl").rmdir()
    # And it does go on from there; nobody reads what it prints, which is no reason to stop.
    with Path("/dev/full").open("w") as full:
        process = start(room, *train("rollouts"), stdout=full)
        code, _, err = finish(process)
    assert code == 0, err
    assert "going on after step 3" in err
    assert "progress cannot be shown: No space left on device; going on without" in err
    assert [line["step"] for line in metrics_of(run_dir) if "actor/lr" in line] == list(range(1, 9))


def full_disk(room: Path) -> None:
    """Neither can be written: the run says both, and the last checkpoint stands."""
    run_dir = room / "full"
    process = start(room, *train("full", "train.num_steps=100000", "checkpoint.interval=2"))
    wait_until(process, lambda: bool(saved_steps(run_dir)) and len(metrics_of(run_dir)) > 2)
    size = (run_dir / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size + 100, size + 100))
    code, _, err = finish(process)
    assert code == 1, err
    # Whichever comes first.
    small, large = (
        r"(metrics|rollouts)\S+: cannot be written: ",
        r"checkpoints/\S+ could not be saved: ",
    )
    assert re.search(rf"full/({small}|{large}.*)File too large", err), err
    assert re.search(r"could not be saved; the checkpoint of step (\d+) stands", err), err
    assert "Traceback" not in err
    # Without the limit it goes on.
    newest = int(saved_steps(run_dir)[-1].removeprefix("step_"))
    code, _, err = finish(start(room, *train("full", f"train.num_steps={newest + 1}")))
    assert code == 0, err
    assert f"going on after step {newest}" in err


def full_at_stop(room: Path) -> None:
    """Asked to stop, it has nothing to come back to: no checkpoint can be written."""
    run_dir = room / "stopped"
    command = train("stopped", "train.num_steps=100000", "checkpoint.interval=0")
    process = start(room, *command)
    wait_until(process, lambda: len(metrics_of(run_dir)) > 1)
    # Room for many lines of metrics, and for no weights.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 1, err
    assert re.search(r"could not be saved: .*File too large", err), err
    assert "stopped: could not be saved; there is no checkpoint yet" in err
    assert "Traceback" not in err
    assert not (run_dir / "requeue").exists()


def full_for_one(room: Path) -> None:
    """Rank 0 cannot write what goes first into a checkpoint, while the other waits for it."""
    command = train("one", "train.num_steps=100000", PIPELINE, "checkpoint.interval=0")
    process = start(room, *command)
    wait_until(process, lambda: len(metrics_of(room / "one")) > 1)
    resource.prlimit(rank_of(process, 0).pid, resource.RLIMIT_FSIZE, (64, 64))
    code, _, err = finish(process)
    assert code == 1, err
    said = [
        line for line in err.splitlines() if line.startswith(f"[rank 0 on {socket.gethostname()}]")
    ]
    assert len(said) == 1, err
    assert re.search(
        r"could not be saved .*; there is no checkpoint yet; .*File too large", said[0]
    )


def spoilt_line(room: Path) -> None:
    """Data is read whole before the first step: a line that is spoilt later disturbs no run."""
    data = room / "task" / "train.jsonl"
    copy = room / "spoilt.jsonl"
    copy.write_bytes(data.read_bytes())
    command = train("spoilt", "data.train_path=spoilt.jsonl")
    process = start(room, *command, "train.num_steps=4")
    wait_until(process, lambda: bool(metrics_of(room / "spoilt")))
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join([*lines[:6], '{"prompt": "torn\n', *lines[7:]]))
    code, _, err = finish(process)
    assert code == 0, err
    code, _, err = finish(start(room, *command, PIPELINE, "train.num_steps=6"))
    assert code == 2, err
    errors = [line for line in err.splitlines() if "spoilt.jsonl:7: not JSON" in line]
    assert len(errors) == 1, err
    assert re.match(r"(\[rank \d on \S+\] )?error: spoilt", errors[0]), err
    assert "Traceback" not in err


# Python runs this first: reward workers die at their start while the file is there.
SITE = """
import os, sys
if "nested_reft_mcore.rewards.worker" in " ".join(sys.orig_argv) and os.path.exists({flag!r}):
    os._exit(9)
"""


def kill_rewards(process: subprocess.Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        # Some leave at any moment.
        with contextlib.suppress(psutil.Error):
            if "nested_reft_mcore.rewards.worker" in " ".join(child.cmdline()):
                child.kill()


def dead_rewards(room: Path) -> None:
    """The step in which it happens is undone: nobody learns from rewards that were not given."""
    tmp_path = room / "site"
    tmp_path.mkdir()
    flag = tmp_path / "flag"
    (tmp_path / "sitecustomize.py").write_text(SITE.format(flag=str(flag)))
    run_dir = room / "rewards"
    command = train("rewards", "train.num_steps=100000", PIPELINE, "checkpoint.interval=0")
    process = start(room, *command, more_path=str(tmp_path))
    wait_until(process, lambda: len(metrics_of(run_dir)) > 1)
    flag.touch()
    kill_rewards(process)
    code, _, err = finish(process)
    assert code == 1, err
    last = max(line["step"] for line in metrics_of(run_dir))
    assert f"stopped: saved after step {last}; the same command goes on from there" in err
    assert re.search(
        rf"\[rank 0 on {HOST}\] rewards cannot be judged any more: .*3 workers in a row did not "
        r"start; the last one: the worker left with exit code 9",
        err,
    ), err
    assert "Traceback" not in err
    assert saved_steps(run_dir) == [f"step_{last:08d}"]
