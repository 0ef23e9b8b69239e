"""What the scripts make of every way in which a job ends; a stand-in plays the processes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from job_cases import Job, JobRoom, sizes
from run_cases import REPOSITORY
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STAND_IN = Path(__file__).with_name("stand_in.sh")
TWO_NODES = sizes(2, 2, "--nodelist=node[1-2]")
ONE_NODE = sizes(1, 2, "--nodelist=node3")
OPTIONS = {
    "fails": TWO_NODES,
    "killed": TWO_NODES,
    "hangs": ONE_NODE,
    "back_from_kill": ONE_NODE,
    "stops": TWO_NODES,
    "no_progress": ONE_NODE,
    "cancelled": ONE_NODE,
    "stays": ONE_NODE,
    "first_lost": ONE_NODE,
    "shared": ONE_NODE,
    "early": ONE_NODE,
    "abrupt": sizes(1, 2, "--nodelist=node4", "--partition=abrupt"),
}


@pytest.fixture(scope="module")
def room(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> JobRoom:
    room = JobRoom(tmp_path_factory.mktemp("room"), cluster)
    room.write_site(
        PYTHON=str(STAND_IN), PATIENCE_SECONDS="4", REQUEUE_ON="3", MAX_IDLE_RESTARTS="1"
    )
    return room


@pytest.fixture(scope="module")
def jobs(room: JobRoom) -> dict[str, Job]:
    """All at once: most of their time is Slurm's pause before a job comes back."""
    return {
        mode: room.submit(
            "train_7b.sh",
            f"run_dir={room.directory / mode}",
            options=options,
            MODE=mode,
            **({"REQUEUE_ON": "4"} if mode == "back_from_kill" else {}),
        )
        for mode, options in OPTIONS.items()
    }


def waits(room: JobRoom, mode: str, rank: int) -> bool:
    return (room.directory / mode / f"waiting.0.{rank}").exists()


def last_lines(log: str) -> str:
    return log[log.rindex("--- rank") :]


def test_the_first_failure_is_the_last_thing_told(jobs: dict[str, Job]) -> None:
    """Rank 2 fails; the others lose it, and end with a higher code."""
    log = jobs["fails"].end(code=1)
    assert log.splitlines()[-1] == (
        "slurm: train failed first at rank 2 on node2: Exited with exit code 1; "
        "ValueError: the cause"
    )
    assert "rank 2 starts, restart 0\nValueError: the cause\n" in last_lines(log)
    # Rank 0 is on the console, the others are in their files.
    before = log[: log.index("--- rank")]
    assert "rank 0 starts, restart 0" in before
    assert "rank 1 starts" not in before
    match = re.search(r"logs are (\S+)\.rank_\*\.log", log)
    assert match is not None
    for rank in range(4):
        assert f"rank {rank} starts" in Path(f"{match[1]}.rank_{rank:03d}.log").read_text()


def test_a_killed_rank_is_a_lost_one(jobs: dict[str, Job]) -> None:
    log = jobs["killed"].end(code=4)
    assert log.splitlines()[-1].startswith("slurm: train failed first at rank 1 on node1: Killed")


def test_a_rank_that_hangs_is_ended_and_not_blamed(jobs: dict[str, Job]) -> None:
    """srun kills it after PATIENCE_SECONDS; the code is what the other one has left with."""
    log = jobs["hangs"].end(code=4)
    assert log.splitlines()[-1] == (
        "slurm: train failed first at rank 0 on node3: Exited with exit code 4; "
        "RuntimeError: rank 1 is silent"
    )


def test_where_rank_0_is_lost_another_one_tells(jobs: dict[str, Job]) -> None:
    assert jobs["first_lost"].end(code=4).splitlines()[-1] == (
        "slurm: train failed first at rank 0 on node3: job ended with code 4; "
        "[rank 0 on node3] was lost: no sign of life for 9 s"
    )


def test_what_all_have_found_is_no_ranks_fault(jobs: dict[str, Job]) -> None:
    log = jobs["shared"].end(code=2)
    assert log.splitlines()[-1] == "slurm: train failed: error: train.jsonl does not exist"


def test_stopped_before_it_has_begun_the_job_comes_back(
    jobs: dict[str, Job], room: JobRoom
) -> None:
    job = jobs["early"]
    job.wait_for((room.directory / "early" / "checking").exists, "its check")
    job.signal("--signal=TERM")
    log = job.end()
    assert "asked to stop before the run began; requeued" in log
    assert job.shows("Restarts") == "1"


def test_a_cancelled_job_stays_away(jobs: dict[str, Job], room: JobRoom) -> None:
    """Slurm would bring even this one back if it was asked to."""
    job = jobs["cancelled"]
    job.wait_for(lambda: waits(room, "cancelled", 1), "its ranks")
    job.signal()
    log = job.end(code=75)
    assert job.shows("JobState") == "CANCELLED"
    assert job.shows("Restarts") == "0"
    assert "asked to stop, saved at step 5; not requeued here, for Slurm has ended the job" in log


def test_a_stop_brings_the_job_back_whatever_srun_says(jobs: dict[str, Job], room: JobRoom) -> None:
    """Rank 0 has saved; rank 1 was killed by the signal, as one is that does not listen yet."""
    job = jobs["stops"]
    job.wait_for(lambda: waits(room, "stops", 0) and waits(room, "stops", 1), "its ranks")
    job.signal("--signal=USR1")
    log = job.end()
    assert (
        "asked to stop, saved at step 5; requeued (0 restarts without progress, 1 at most)" in log
    )
    assert job.shows("Restarts") == "1"
    assert log.count("(nested-reft-7b), restart 0,") == 1
    assert log.count("(nested-reft-7b), restart 1,") == 1
    # What was written by the first start is gone, or the second would come back as well.
    assert not (room.directory / "stops" / "requeue").exists()


def test_a_stop_of_a_job_that_may_not_be_requeued(jobs: dict[str, Job], room: JobRoom) -> None:
    job = jobs["stays"]
    job.wait_for(lambda: waits(room, "stays", 0) and waits(room, "stays", 1), "its ranks")
    room.cluster.call("scontrol", "update", f"JobId={job.number}", "Requeue=0")
    job.signal("--signal=USR1")
    log = job.end(code=75)
    assert job.shows("Restarts") == "0"
    assert "not requeued: submit the job again, and it goes on" in log


def test_without_progress_it_is_left_alone(jobs: dict[str, Job]) -> None:
    job = jobs["no_progress"]
    log = job.end(code=75)
    assert job.shows("Restarts") == "1"
    assert "requeued (0 restarts without progress, 1 at most)" in log
    assert "not requeued: 1 restarts have brought it no further than step 5" in log


def test_a_lost_process_brings_the_job_back_if_told_to(jobs: dict[str, Job]) -> None:
    job = jobs["back_from_kill"]
    log = job.end()
    assert job.shows("Restarts") == "1"
    assert "exit code 4, one of REQUEUE_ON; requeued" in log
    assert "slurm: train failed first at rank 1 on node3: Killed" in log


def test_preempted_without_notice_slurm_alone_requeues(jobs: dict[str, Job], room: JobRoom) -> None:
    job = jobs["abrupt"]
    job.wait_for(lambda: waits(room, "abrupt", 1), "its ranks")
    # 63 of 64 CPUs: one of the two tasks is in the way.
    options = ("--partition=high", "--nodelist=node4", "--ntasks=1", "--cpus-per-task=63")
    room.cluster.call("sbatch", *options, "--output=/dev/null", "--wrap=sleep 1")
    log = job.end()
    assert job.shows("Restarts") == "1"
    assert "requeued (" not in log
    assert log.count("(nested-reft-7b), restart 1,") == 1


def test_a_container_by_apptainer(room: JobRoom, tmp_path: Path) -> None:
    """A stand-in for apptainer notes its arguments and runs what comes after the image."""
    script = tmp_path / "apptainer"
    script.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/said\n'
        'while [[ $1 != *.sif ]]; do shift; done\nshift\nexec "$@"\n'
    )
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    image, run_dir = "/images/my torch.sif", tmp_path / "run"
    site = (room.directory / "env.sh").read_text()
    (tmp_path / "env.sh").write_text(
        f"{site}CONTAINER_IMAGE='{image}'\nCONTAINER_RUNTIME=apptainer\n"
        "CONTAINER_MOUNTS=('/some models:/models')\n"
    )
    job = room.submit(
        "train_7b.sh",
        f"run_dir={run_dir}",
        options=ONE_NODE,
        PATH=path,
        NESTED_REFT_ENV=str(tmp_path / "env.sh"),
    )
    job.end()
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:3] == ["exec", "--nv", "--pwd"]
    assert "/some models:/models" in said
    after = said[said.index(image) + 1 :]
    assert after[:4] == [str(STAND_IN), "-m", "nested_reft_mcore", "train"]


def test_a_container_by_pyxis_is_left_to_srun(room: JobRoom, tmp_path: Path) -> None:
    """This Slurm has no pyxis, so its srun refuses the option; what counts is that it gets it."""
    site = (room.directory / "env.sh").read_text()
    (tmp_path / "env.sh").write_text(f"{site}CONTAINER_IMAGE=/images/torch.sqsh\n")
    job = room.submit(
        "train_7b.sh", "--dry-run", options=ONE_NODE, NESTED_REFT_ENV=str(tmp_path / "env.sh")
    )
    log = job.end(code=255)
    assert "'--container-image=/images/torch.sqsh'" in log
    assert f"'--container-mounts={REPOSITORY}:{REPOSITORY},{room.directory}:" in log
    assert "srun: unrecognized option '--container-image=/images/torch.sqsh'" in log
