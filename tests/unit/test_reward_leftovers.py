"""A reward that forks, prints or writes leaves no process behind and costs its own item only."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reward_cases import MARK, left_after, marked_processes

import nested_reft_mcore
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.pool import RewardPool
from nested_reft_mcore.rewards.worker_output import MAX_OUTPUT_BYTES

REPOSITORY = Path(nested_reft_mcore.__file__).parents[1]

FORKING = """
import os, subprocess, sys, time

def linger():
    time.sleep(3600)
    os._exit(0)

def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            linger()
        os._exit(0)
    os.wait()

def reward(item):
    what = item.completion
    if "fork" in what and os.fork() == 0:
        linger()
    if "daemon" in what:
        daemon()
    if "popen" in what:
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
    if "many" in what:
        for _ in range(20):
            daemon()
    if "twice" in what:
        os.fork()
    if "raising child" in what and os.fork() == 0:
        sys.exit(5)
    if "exit" in what:
        os._exit(4)
    if "hang" in what:
        time.sleep(3600)
    if "leave" in what:
        sys.exit(2)
    if "print" in what:
        for _ in range(100):
            print("y" * 100_000)
        print("\\x1b[2J last", flush=True)
    if "answer" in what:
        for number in range(3, 30):
            try:
                os.write(number, b"\\xff" * 64)
            except OSError:
                pass
    if "file" in what:
        with open(os.environ["A_FILE"], "wb") as file:
            os.ftruncate(file.fileno(), 1 << 31)
    return float(len(what))
"""


@pytest.fixture
def mark(tmp_path, monkeypatch):
    (tmp_path / "forking_reward.py").write_text(FORKING, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("A_FILE", str(tmp_path / "file"))
    monkeypatch.setenv(MARK, str(tmp_path))
    return str(tmp_path)


def items(*completions: str) -> list[RewardItem]:
    return [RewardItem("", completion, "") for completion in completions]


def test_what_a_reward_forks_ends_with_its_call(mark):
    """Supervisor, warm process and worker are left; the worker goes on: nothing was an error."""
    forking = ["fork", "daemon", "popen", "many", "twice", "raising child"]
    with RewardPool("forking_reward:reward", deadline_seconds=60) as pool:
        pool.score(items("a"))
        before = marked_processes(mark)
        assert len(before) == 3
        results = pool.score(items(*forking))
        assert [result.value for result in results] == [float(len(what)) for what in forking]
        assert marked_processes(mark) == before
    assert left_after(mark, 0) == set()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fork daemon exit", "the worker left with exit code 4"),
        ("fork daemon popen hang", "longer than the deadline of 1 s"),
    ],
)
def test_what_a_lost_worker_has_forked_ends_too(mark, what, reason):
    with RewardPool("forking_reward:reward", deadline_seconds=1) as pool:
        before, lost, after = pool.score(items("a", what, "ccc"))
        assert (before.value, lost.value, after.value) == (1.0, 0.0, 3.0)
        assert lost.error == reason
        assert len(marked_processes(mark)) == 3
    assert left_after(mark, 0) == set()


def test_nothing_outlives_a_killed_pool(mark):
    code = """
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.pool import RewardPool
pool = RewardPool("forking_reward:reward", deadline_seconds=600)
pool.score([RewardItem("", "a", "")])
print("ready", flush=True)
pool.score([RewardItem("", "fork daemon hang", "")])
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ["PYTHONPATH"]])
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == "ready\n"
        while len(marked_processes(mark)) < 6:
            assert parent.poll() is None
        parent.kill()
        parent.wait()
    assert left_after(mark) == set()


def test_exits_garbage_and_long_files_cost_their_item(mark, tmp_path):
    with RewardPool("forking_reward:reward", deadline_seconds=60) as pool:
        left, answered, filed, after = pool.score(items("leave", "answer", "file", "dddd"))
        assert left.error == "SystemExit: 2"
        assert "wrote to the worker's pipe: a message of 4294967295 bytes" in (answered.error or "")
        assert "OSError: [Errno 27] File too large" in (filed.error or "")
        assert (after.value, pool.errors) == (4.0, 3)
    assert (tmp_path / "file").stat().st_size == 0


def test_prints_reach_the_log_up_to_a_limit(mark, caplog):
    with (
        caplog.at_level(logging.INFO, "nested_reft_mcore"),
        RewardPool("forking_reward:reward", deadline_seconds=60) as pool,
    ):
        results = pool.score(items("print", "print exit", "ccc"))
        assert [result.value for result in results] == [5.0, 0.0, 3.0]
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("a reward says: yyyy") for line in said)
    assert sum("what they print from now on is left out" in line for line in said) == 1
    assert sum(map(len, said)) < 2 * MAX_OUTPUT_BYTES
    assert not any("\x1b" in line for line in said)


def test_a_worker_that_cannot_start_is_quoted(mark, tmp_path):
    code = "import os, sys; print('no licence', file=sys.stderr, flush=True); os._exit(9)"
    (tmp_path / "sitecustomize.py").write_text(code)
    reason = "3 workers in a row did not start; .* exit code 9; it said: no licence"
    with RewardPool("forking_reward:reward") as pool, pytest.raises(UserError, match=reason):
        pool.score(items("a"))
