"""A reward that hangs, crashes or raises costs its own item; the pool goes on, or ends whole."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import nested_reft_mcore
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.pool import RewardPool

REPOSITORY = Path(nested_reft_mcore.__file__).parents[1]
DEADLINE = 1.0

HOSTILE = '''
"""The completion says what happens."""
import ctypes, os, sys, time

def reward(item):
    completion = item.completion
    if completion == "sleep":
        time.sleep(3600)
    if completion == "spin in C":
        return 7 ** 10 ** 9 % 10
    if completion == "exit":
        os._exit(0)
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "killed":
        os.kill(os.getpid(), 9)
    if completion == "recursion":
        return reward(item)
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "print":
        print("x" * 10_000)
    if completion == "read":
        return float(len(sys.stdin.read()) + 1)
    if completion == "memory":
        return float(len(bytearray(64 << 30)))
    if completion == "nan":
        return float("nan")
    if completion == "torch":
        return float("torch" in sys.modules)
    if completion == "text":
        return "1.0"
    if completion == "pid":
        return os.getpid()
    return float(len(completion))
'''


@pytest.fixture(autouse=True)
def hostile_module(tmp_path, monkeypatch):
    (tmp_path / "hostile_reward.py").write_text(HOSTILE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


def items(*completions: str) -> list[RewardItem]:
    return [RewardItem("question", completion, "43") for completion in completions]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be collected."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("exit", "exit code 0"),
        ("segfault", "signal 11"),
        ("killed", "signal 9"),
        ("recursion", "RecursionError"),
        ("raise", "KeyError: 'no such thing'"),
        ("nan", "the reward is nan"),
        ("text", "TypeError: the reward returned '1.0' (str); expected a real number"),
        ("memory", "MemoryError"),
    ],
)
def test_a_failure_costs_one_item(completion, reason):
    with RewardPool("hostile_reward:reward", deadline_seconds=30) as pool:
        before, failed, after = pool.score(items("a", completion, "ccc"))
    assert (before.value, before.error) == (1.0, None)
    assert (after.value, after.error) == (3.0, None)
    assert failed.value == 0.0
    assert reason in (failed.error or "")
    assert not failed.timed_out
    assert (pool.timeouts, pool.errors) == (0, 1)


@pytest.mark.parametrize("completion", ["sleep", "spin in C"])
def test_the_deadline_holds_for_each_item(completion):
    with RewardPool("hostile_reward:reward", deadline_seconds=DEADLINE) as pool:
        pool.score(items("warm"))
        hanging = pool.worker_pids
        start = time.monotonic()
        results = pool.score(items("a", completion, "bb", completion, "ccc"))
        elapsed = time.monotonic() - start
        assert wait_until_gone(list(hanging), 0) == []
    assert [result.value for result in results] == [1.0, 0.0, 2.0, 0.0, 3.0]
    assert [result.timed_out for result in results] == [False, True, False, True, False]
    assert (pool.timeouts, pool.errors) == (2, 0)
    assert 2 * DEADLINE <= elapsed < 2 * DEADLINE + 15


def test_a_worker_that_takes_nothing_up_is_replaced(monkeypatch):
    monkeypatch.setattr("nested_reft_mcore.rewards.worker_process.TAKE_UP_SECONDS", 0.5)
    with RewardPool("hostile_reward:reward", deadline_seconds=0.5) as pool:
        pool.score(items("warm"))
        os.kill(pool.worker_pids[0], signal.SIGSTOP)
        results = pool.score(items("a", "bb"))
    assert [result.value for result in results] == [1.0, 2.0]
    assert (pool.replacements, pool.timeouts) == (1, 0)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_keep_the_order_of_the_items(num_workers):
    lengths = [(7 * index) % 50 for index in range(1000)]
    with RewardPool("hostile_reward:reward", num_workers, deadline_seconds=30) as pool:
        results = pool.score(items(*("x" * length for length in lengths)))
        assert pool.score([]) == []
    assert [result.value for result in results] == lengths


def test_workers_share_the_work():
    with RewardPool("hostile_reward:reward", 2, deadline_seconds=30) as pool:
        pids = {int(result.value) for result in pool.score(items(*["pid"] * 400))}
        assert pids == set(pool.worker_pids)
        assert os.getpid() not in pids


def test_any_text_arrives_whole():
    texts = ["9" * 1_000_000, "\0\0", "\ud800 lone", "\U0001d11e", "\r\n\u2028", ""]
    with RewardPool("hostile_reward:reward", deadline_seconds=30) as pool:
        results = pool.score(items(*texts))
    assert [result.value for result in results] == [len(text) for text in texts]


def test_the_reward_cannot_touch_the_pipes():
    with RewardPool("hostile_reward:reward", deadline_seconds=30) as pool:
        results = pool.score(items("print", "read", "ab"))
    assert [result.value for result in results] == [5.0, 1.0, 2.0]


def test_signals_of_the_job_leave_the_workers_alone():
    with RewardPool("hostile_reward:reward", deadline_seconds=30) as pool:
        pool.score(items("warm"))
        (pid,) = pool.worker_pids
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
        assert pool.score(items("pid"))[0].value == pid


def test_a_worker_that_died_between_batches_costs_nothing():
    with RewardPool("hostile_reward:reward", deadline_seconds=30) as pool:
        pool.score(items("warm"))
        (pid,) = pool.worker_pids
        os.kill(pid, signal.SIGKILL)
        assert wait_until_gone([pid], 10) == []
        assert pool.score(items("a"))[0].value == 1.0
    assert pool.errors == 0


def test_a_death_that_the_pool_has_not_heard_of_costs_nothing():
    with RewardPool("hostile_reward:reward", deadline_seconds=30) as pool:
        pool.score(items("warm"))
        (pid,) = pool.worker_pids
        teller = psutil.Process(pid).parent()
        assert teller is not None
        teller.suspend()
        os.kill(pid, signal.SIGKILL)
        later = threading.Timer(0.3, teller.resume)
        later.start()
        assert pool.score(items("a"))[0].value == 1.0
        later.join()
        assert pool.worker_pids != (pid,)
    assert pool.errors == 0


def test_closing_ends_every_worker_at_once():
    pool = RewardPool("hostile_reward:reward", 2, deadline_seconds=30)
    pool.score(items("a", "b"))
    pids = list(pool.worker_pids)
    assert all(is_running(pid) for pid in pids)
    pool.close()
    assert wait_until_gone(pids, 0) == []
    with pytest.raises(RuntimeError, match="closed"):
        pool.score(items("a"))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hanging"])
def test_workers_end_with_a_killed_parent(busy):
    code = f"""
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.pool import RewardPool
pool = RewardPool("hostile_reward:reward", 2, deadline_seconds=3)
pool.score([RewardItem("", "a", "")] * 64)
print(*pool.worker_pids, flush=True)
pool.score([RewardItem("", "spin in C", "")] * 8 if {busy} else [])
import time
time.sleep(60)
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ["PYTHONPATH"]])
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.5)
        parent.kill()
        parent.wait()
    assert wait_until_gone(pids, 3 + 10) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "expected one of exact_match, .*, or module:function"),
        ("no_such_module:reward", "No module named 'no_such_module'"),
        ("hostile_reward:no_such_function", "no_such_function"),
    ],
)
def test_an_unknown_reward_is_the_users_mistake(name, message):
    with RewardPool(name) as pool, pytest.raises(UserError, match=message):
        pool.score(items("a"))


@pytest.mark.parametrize(("num_workers", "deadline_seconds"), [(0, 1.0), (1, 0.0)])
def test_sizes_must_be_positive(num_workers, deadline_seconds):
    with pytest.raises(ValueError, match="must be positive"):
        RewardPool("numeric_match", num_workers, deadline_seconds)


def test_workers_start_without_torch():
    code = (
        "import sys; from nested_reft_mcore.rewards import math_verify, numeric_match, worker; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "False"
    with RewardPool("hostile_reward:reward") as pool:
        assert pool.score(items("torch"))[0].value == 0.0


@pytest.mark.parametrize("name", ["numeric_match", "math_verify"])
def test_named_rewards_judge(name):
    with RewardPool(name, deadline_seconds=60) as pool:
        results = pool.score(items(r"so \boxed{43}", "44", "no number", ""))
    assert [result.value for result in results] == [1.0, 0.0, 0.0, 0.0]
    assert (pool.timeouts, pool.errors) == (0, 0)
