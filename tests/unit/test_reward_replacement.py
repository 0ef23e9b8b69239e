"""A lost worker is replaced at once, and no item pays for the start of its worker."""

import time

import pytest
from reward_cases import MARK, left_after, marked_processes

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.pool import RewardPool

IMPORT_SECONDS = 1.0
DEADLINE = 0.5

SLOW_START = f"""
import os, threading, time

if os.environ.get("WITH_THREAD"):
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
time.sleep({IMPORT_SECONDS})

def reward(item):
    if item.completion == "crash":
        os._exit(3)
    if item.completion == "end the parent":
        os.kill(os.getppid(), 9)
        time.sleep(3600)
    return 1.0

def texts(items):
    return "11"

texts.reward_scope = "group"
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    path = tmp_path / "slow_start.py"
    path.write_text(SLOW_START, encoding="utf-8")
    monkeypatch.setenv(MARK, str(tmp_path))
    for name in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.setenv(f"{name}_NUM_THREADS", "1")
    return path


def items(*completions: str) -> list[RewardItem]:
    return [RewardItem("", completion, "") for completion in completions]


def test_fifty_crashes_cost_no_start(module, tmp_path):
    """Each start takes a second; with one for every crash this would take fifty."""
    with RewardPool(f"{module}:reward", 1, deadline_seconds=DEADLINE) as pool:
        pool.scopes()
        start = time.monotonic()
        results = pool.score(items(*["crash", "good"] * 50))
        assert time.monotonic() - start < 20
        assert [result.value for result in results] == [0.0, 1.0] * 50
        assert (pool.errors, pool.timeouts) == (50, 0)
        assert (pool.replacements, pool.num_spares) == (50, 0)
        assert len(marked_processes(str(tmp_path))) == 3
    assert left_after(str(tmp_path), 0) == set()


def test_a_module_with_threads_is_not_forked_and_has_a_spare_worker(module, tmp_path, monkeypatch):
    monkeypatch.setenv("WITH_THREAD", "1")
    with RewardPool(f"{module}:reward", 1, deadline_seconds=DEADLINE) as pool:
        pool.score(items("good"))
        assert pool.num_spares == 1
        (first,) = pool.worker_pids
        results = pool.score(items("crash", "good", "crash", "good"))
        assert [result.value for result in results] == [0.0, 1.0, 0.0, 1.0]
        # Starting takes longer than the deadline, and is not counted against any item.
        assert (pool.errors, pool.timeouts, pool.replacements) == (2, 0, 2)
        assert pool.worker_pids != (first,)
        # Supervisor and worker, and the same of a spare, which may be at its start.
        assert 3 <= len(marked_processes(str(tmp_path))) <= 4
    assert left_after(str(tmp_path), 0) == set()


def test_a_reward_that_ends_the_warm_process_costs_its_item(module, tmp_path):
    with RewardPool(f"{module}:reward", 1, deadline_seconds=30) as pool:
        results = pool.score(items("end the parent", "good"))
        assert [result.value for result in results] == [0.0, 1.0]
        assert "signal 9" in (results[0].error or "")
    assert left_after(str(tmp_path), 0) == set()


def test_a_module_that_hangs_while_imported_is_named_once(module):
    pool = RewardPool(f"{module}:reward", 2, deadline_seconds=30, start_seconds=0.3)
    start = time.monotonic()
    reason = r"cannot be imported: .*reward.start_timeout_seconds=0.3, in .*slow_start.py:6"
    with pool, pytest.raises(UserError, match=reason):
        pool.score(items("good"))
    assert time.monotonic() - start < 10


def test_a_text_is_no_sequence_of_numbers(module):
    with RewardPool(f"{module}:texts", 1, deadline_seconds=30) as pool:
        (one, _) = pool.score(items("a", "b"))
    reason = "TypeError: the reward returned '11' (str); expected a sequence of 2 numbers"
    assert one.error == reason
