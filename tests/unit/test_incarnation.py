"""A run directory is one start's, and the newest start's; moments of death are where they are."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.faults import FAULT_VARIABLE, fault_point
from nested_reft_mcore.launch.incarnation import (
    INCARNATION_FILE,
    SupersededError,
    check_owner,
    owner,
    take_over,
    this_incarnation,
)


def slurm(job: int, restarts: int | None = None) -> dict[str, str]:
    count = {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    return {"SLURM_JOB_ID": str(job), **count}


def test_starts_are_told_apart() -> None:
    first, second = this_incarnation({}), this_incarnation({})
    assert first.job == second.job == f"{first.host}-{first.pid}"
    assert first.token != second.token
    restarted = this_incarnation(slurm(7, 2) | {"TORCHELASTIC_RUN_ID": "none"})
    assert (restarted.job, restarted.restart) == ("slurm-7", 2)
    assert this_incarnation(slurm(7)).restart == 0
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert this_incarnation(elastic).job.startswith(f"torchrun-none-{first.host}-")
    assert this_incarnation(elastic).restart == 3


def test_the_newest_start_owns_the_directory(tmp_path: Path) -> None:
    first, second = this_incarnation({}), this_incarnation(slurm(7))
    assert owner(tmp_path) is None
    check_owner(tmp_path, first)
    assert take_over(tmp_path, first) is None
    check_owner(tmp_path, first)
    assert take_over(tmp_path, second) == first
    assert owner(tmp_path) == second
    check_owner(tmp_path, second)
    with pytest.raises(SupersededError, match=r"now belongs to job slurm-7, restart 0, process"):
        check_owner(tmp_path, first)
    assert [path.name for path in tmp_path.iterdir()] == [INCARNATION_FILE]


def test_a_straggler_of_the_same_job_gives_way(tmp_path: Path) -> None:
    take_over(tmp_path, this_incarnation(slurm(7, 2)))
    message = r"belongs to job slurm-7, restart 2, .*this is restart 1 of the same job"
    with pytest.raises(UserError, match=message):
        take_over(tmp_path, this_incarnation(slurm(7, 1)))
    again = this_incarnation(slurm(7, 2))
    take_over(tmp_path, again)
    take_over(tmp_path, this_incarnation(slurm(8, 0)))
    take_over(tmp_path, replace(again, restart=3))
    assert owner(tmp_path) == replace(again, restart=3)


def test_a_file_that_means_nothing_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / INCARNATION_FILE).write_text('{"job": 1}')
    assert owner(tmp_path) is None
    take_over(tmp_path, this_incarnation({}))
    assert owner(tmp_path) is not None


def test_faults_strike_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fault_point("mid-rollout", 3, 1)
    monkeypatch.setenv(FAULT_VARIABLE, "mid-rollout@3:1:SIGUSR2")
    received: list[int] = []
    former = signal.signal(signal.SIGUSR2, lambda number, _frame: received.append(number))
    try:
        fault_point("mid-update", 3, 1)
        fault_point("mid-rollout", 2, 1)
        fault_point("mid-rollout", 3, 0)
        assert received == []
        fault_point("mid-rollout", 3, 1)
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert received == [signal.SIGUSR2]
    monkeypatch.setenv(FAULT_VARIABLE, "mid-rollout")
    with pytest.raises(ValueError, match="expected MOMENT@STEP"):
        fault_point("mid-rollout", 3, 0)


def test_a_fault_without_a_signal_kills() -> None:
    program = (
        "import os; os.environ['NESTED_REFT_FAULT'] = 'mid-update@3'\n"
        "from nested_reft_mcore.launch.faults import fault_point\n"
        "fault_point('mid-update', 3, 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
