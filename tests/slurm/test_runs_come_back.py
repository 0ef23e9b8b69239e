"""Real runs: asked to stop, preempted and brought back; and a sweep with its table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from job_cases import Job, JobRoom, sizes
from run_cases import PIPELINE, finish, metrics_of, start, without_times, write_room
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]

NUM_STEPS = 24
LONG = (
    PIPELINE,
    f"train.num_steps={NUM_STEPS}",
    "evaluation.interval=0",
    "data.eval_path=null",
    "checkpoint.interval=0",
    "logging.tensorboard=false",
)
SWEEP = ("train.num_steps=2", "evaluation.interval=2", "logging.tensorboard=false")


@pytest.fixture(scope="module")
def room(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> JobRoom:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return JobRoom(directory, cluster)


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in metrics_of(run_dir)), default=-1)


def saved(job: Job, restarts: int, run_dir: Path) -> int:
    """Wait until the job has been requeued so many times; the step that it goes on from."""
    job.wait_for(lambda: job.shows("Restarts") == str(restarts), f"restart {restarts}")
    return int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))


def test_stopped_and_preempted_it_computes_the_same(room: JobRoom) -> None:
    """On two nodes: SIGUSR1 to its step; then another job takes all nodes from it."""
    whole = start(room.directory, "train", "config.yaml", *LONG, "run_dir=whole")
    run_dir = room.directory / "often"
    job = room.submit("train_7b.sh", room.config, *LONG, "run_dir=often", options=sizes(2, 1))
    job.wait_for(lambda: last_step(run_dir) >= 2, "a step")
    job.signal("--signal=USR1")
    first = saved(job, 1, run_dir)
    job.wait_for(lambda: last_step(run_dir) > first, "progress after the restart")
    taker = ("--partition=high", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=64")
    room.cluster.call("sbatch", *taker, "--output=/dev/null", "--wrap=sleep 1")
    second = saved(job, 2, run_dir)
    log = job.end()
    assert 0 < first < second < NUM_STEPS
    assert job.shows("Restarts") == "2"
    for restart, step in ((1, first), (2, second)):
        assert f"asked to stop, saved at step {step}; requeued (0 restarts without progress" in log
        assert f"(nested-reft-7b), restart {restart}," in log
        assert f"going on after step {step}" in log
    code, _, err = finish(whole)
    assert code == 0, err
    assert without_times(metrics_of(run_dir)) == without_times(metrics_of(room.directory / "whole"))


def test_a_sweep_of_three_and_its_table(room: JobRoom) -> None:
    job = room.submit(
        "sweep.sh",
        room.config,
        *SWEEP,
        options=(*sizes(1, 1), "--array=0-2"),
        SKIP_RATIOS="0.34",
        CORRECTIONS="practical tis retrace",
        SEEDS="5",
        SWEEP_DIR="sweep",
    )
    table = room.directory / "sweep" / "results.csv"

    def rows() -> list[dict[str, str]]:
        if not table.exists():
            return []
        with table.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    job.wait_for_array(lambda: len([row for row in rows() if row["steps"] == "2"]) == 3)
    found = {row["run"]: row for row in rows()}
    assert sorted(row["correction"] for row in found.values()) == ["practical", "retrace", "tis"]
    for row in found.values():
        assert row["run"] == f"skip_0.34.{row['correction']}.seed_5"
        assert (row["skip_ratio"], row["seed"], row["of"]) == ("0.34", "5", "2")
        lines = metrics_of(room.directory / "sweep" / row["run"])
        rewards = [line["critic/rewards/mean"] for line in lines if "critic/rewards/mean" in line]
        assert float(row["reward"]) == pytest.approx(sum(rewards) / 2)
