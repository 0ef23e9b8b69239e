"""A rank is killed, a rank is stopped, a node goes down: the job ends soon, with 4 and the reason.

Three real runs at the same time.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from job_cases import Job, JobRoom, sizes
from run_cases import PIPELINE, metrics_of, write_room
from slurm_cluster import SlurmCluster

from nested_reft_mcore.checkpoints.manifest import verify
from nested_reft_mcore.checkpoints.root import list_checkpoints

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]

DEADLINE_SECONDS = 10
END_SECONDS = 60.0
ENDLESS = (
    *(PIPELINE, "train.num_steps=100000", "logging.tensorboard=false", "checkpoint.interval=1"),
    *("evaluation.interval=0", "data.eval_path=null", "checkpoint.keep_last=1000"),
    f"launch.peer_deadline_seconds={DEADLINE_SECONDS}",
)
OPTIONS = {
    "killed": ("--nodelist=node1,node2",),
    "stopped": ("--nodelist=node3,node4",),
    # Has to find other nodes when it comes back. No GPUs: after the loss of a node Slurm 22.05
    # gives them to the requeued job, but refuses them to its steps.
    "node_lost": ("--gpus-per-node=0",),
}


@pytest.fixture(scope="module")
def room(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> JobRoom:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    room = JobRoom(directory, cluster)
    room.write_site(PATIENCE_SECONDS="10")
    return room


@pytest.fixture(scope="module")
def jobs(room: JobRoom) -> dict[str, Job]:
    """All three, each with a checkpoint behind it."""
    jobs = {
        name: room.submit(
            "train_7b.sh",
            *(room.config, *ENDLESS, f"run_dir={name}"),
            options=sizes(2, 1, *more),
            REQUEUE_ON="4" if name == "node_lost" else "",
        )
        for name, more in OPTIONS.items()
    }
    for name, job in jobs.items():
        job.wait_for(lambda name=name: len(checkpoints(room, name)) > 1, "a checkpoint")
    return jobs


def checkpoints(room: JobRoom, name: str) -> dict[int, Path]:
    return list_checkpoints(room.directory / name / "checkpoints")


def processes(job: Job) -> list[psutil.Process]:
    """Everything that a job is made of, on all nodes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            # Other clusters on this machine have jobs of the same number.
            ours = environment.get("SLURM_CONF") == str(job.cluster.conf)
            if ours and environment.get("SLURM_JOB_ID") == job.number:
                found.append(process)
    return found


def send_to_rank(job: Job, rank: int, number: signal.Signals) -> None:
    for process in processes(job):
        with contextlib.suppress(psutil.Error):
            step = process.environ().get("SLURM_STEP_ID", "")
            command = " ".join(process.cmdline())
            is_rank = process.environ().get("SLURM_PROCID") == str(rank) and step.isdigit()
            if is_rank and " train " in command and "rewards.worker" not in command:
                process.send_signal(number)
                return
    raise AssertionError(f"rank {rank} of job {job.number} is not there")


def ended(job: Job, begun: float) -> str:
    """The log of a job that has ended in time, with 4, and of which nothing is left."""
    log = job.end(code=4)
    assert time.monotonic() - begun < END_SECONDS, log
    deadline = time.monotonic() + 10
    while left := processes(job):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return log


def check_newest(room: JobRoom, name: str) -> int:
    """The step of the newest checkpoint, every byte of which is read."""
    step, path = max(checkpoints(room, name).items())
    assert verify(path, "checksums") == []
    return step


def test_a_rank_is_killed(room: JobRoom, jobs: dict[str, Job]) -> None:
    begun = time.monotonic()
    send_to_rank(jobs["killed"], 1, signal.SIGKILL)
    log = ended(jobs["killed"], begun)
    last = log.splitlines()[-1]
    assert re.match(r"slurm: train failed first at rank 1 on node2: ", last), log
    assert re.search(r"\[rank 1 on \S+\] ", last), log
    assert check_newest(room, "killed") >= 1
    assert jobs["killed"].shows("Restarts") == "0"


def test_a_rank_is_stopped(room: JobRoom, jobs: dict[str, Job]) -> None:
    begun = time.monotonic()
    send_to_rank(jobs["stopped"], 1, signal.SIGSTOP)
    log = ended(jobs["stopped"], begun)
    last = log.splitlines()[-1]
    assert re.match(r"slurm: train failed first at rank 1 on node4: ", last), log
    assert re.search(r"\[rank 1 on \S+\] ", last), log
    assert check_newest(room, "stopped") >= 1


def test_a_node_is_lost_and_the_job_comes_back_elsewhere(
    room: JobRoom, jobs: dict[str, Job], cluster: SlurmCluster
) -> None:
    """The run goes on from its last checkpoint, on nodes that are there."""
    job, run_dir = jobs["node_lost"], room.directory / "node_lost"
    nodes = cluster.call("scontrol", "show", "hostnames", job.shows("NodeList")).split()
    # The first one has the batch script.
    lost = int(nodes[1].removeprefix("node"))
    begun = time.monotonic()
    cluster.lose_node(lost)
    try:
        job.wait_for(lambda: "one of REQUEUE_ON; requeued (0 restarts" in job.log, "a decision")
        assert time.monotonic() - begun < END_SECONDS, job.log
        step = check_newest(room, "node_lost")
        job.wait_for(lambda: f"going on after step {step}" in job.log, "going on")
        assert f"node{lost}" not in job.shows("NodeList")
        job.wait_for(lambda: max(checkpoints(room, "node_lost")) > step, "progress")
        recorded = [line["step"] for line in metrics_of(run_dir) if "actor/lr" in line]
        assert recorded == list(range(1, len(recorded) + 1))
        job.signal()
    finally:
        cluster.start_node(lost)
