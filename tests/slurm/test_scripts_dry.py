"""What the scripts say and refuse before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_cases import JobRoom, sizes
from run_cases import write_room
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def room(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> JobRoom:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return JobRoom(directory, cluster)


def test_dry_run_of_the_shipped_script_on_four_nodes(room: JobRoom) -> None:
    """As it is, without env.sh: the overrides alone stand in for the configuration's model."""
    missing = str(room.directory / "nowhere.sh")
    job = room.submit(
        "train_7b.sh",
        room.config,
        "--dry-run",
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=2",
        "rollout.prompts_per_step=32",
        "data.system_prompt='a $(exit 9) \"b\" *'",
        options=("--nodes=4",),
        NESTED_REFT_ENV=missing,
    )
    log = job.end()
    assert f"{missing} is missing: this dry run takes the defaults" in log
    assert "4 x 8 tasks on node[1-4], by srun, master node1:" in log
    assert "'--kill-on-bad-exit=0'" in log
    for node in range(4):
        said = [line[3:] for line in log.splitlines() if line.startswith(f"{node}: ")]
        assert said[0] == f"node {node + 1} of 4: node{node + 1}"
        # Quoted, and not evaluated on the way.
        assert "'data.system_prompt='\"'\"'a $(exit 9) \"b\" *'\"'\"''" in said[1]
        assert "layout: 32 processes = 1 tensor x 2 pipeline x 16 data" in said
        stage = node // 2
        assert f"  rank {8 * node}: tensor 0, pipeline {stage}, data {8 * node % 16}" in said
        assert sum(line.startswith("  rank ") for line in said) == 8


def test_without_settings_nothing_starts(room: JobRoom) -> None:
    missing = str(room.directory / "nowhere.sh")
    job = room.submit("train_7b.sh", NESTED_REFT_ENV=missing)
    log = job.end(code=2)
    assert (
        f"error: {missing} is missing; make it with `cp slurm/env.example.sh slurm/env.sh`" in log
    )


def test_a_mistake_ends_the_job_before_its_ranks_start(room: JobRoom) -> None:
    job = room.submit("train_7b.sh", room.config, "train.num_stepz=3", options=sizes(2, 2))
    log = job.end(code=2)
    assert "train.num_stepz" in log
    assert "train.num_steps" in log
    assert "Traceback" not in log
    assert "logs are" not in log


def test_a_sweep_without_so_many_combinations(room: JobRoom) -> None:
    options = (*sizes(1, 1), "--array=7")
    job = room.submit("sweep.sh", room.config, options=options, SEEDS="0", SKIP_RATIOS="0 0.5")
    job.end(code=2)
    log = job.log_file.with_name(f"{job.log_file.name}.7").read_text()
    assert "error: --array: task 7, but there are 6 combinations: --array=0-5" in log


def test_example_settings_are_valid(room: JobRoom) -> None:
    """Copied and not edited, they give what a dry run without them gives."""
    example = Path(__file__).parents[2] / "slurm" / "env.example.sh"
    job = room.submit(
        "train_7b.sh", room.config, "--dry-run", options=sizes(1, 1), NESTED_REFT_ENV=str(example)
    )
    assert "0: layout: 1 processes = 1 tensor x 1 pipeline x 1 data" in job.end()
