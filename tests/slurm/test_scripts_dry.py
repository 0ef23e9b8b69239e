"""What the scripts say and refuse before anything is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from job_cases import JobRoom, sizes
from run_cases import REPOSITORY, write_room
from slurm_cluster import SlurmCluster

FITS = "FITS: the worst rank"

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def room(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> JobRoom:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return JobRoom(directory, cluster)


def test_dry_run_of_the_shipped_script_on_four_nodes(room: JobRoom) -> None:
    """As it is, without env.sh and without the model's files."""
    missing = str(room.directory / "nowhere.sh")
    job = room.submit(
        "train_7b.sh",
        "--dry-run",
        "data.system_prompt='a $(exit 9) \"b\" *'",
        options=("--nodes=4",),
        NESTED_REFT_ENV=missing,
    )
    log = job.end()
    assert f"{missing} is missing: this dry run takes the defaults" in log
    assert "4 x 8 tasks on node[1-4], by srun, master node1:" in log
    (command,) = (line for line in log.splitlines() if line.startswith("slurm: command: "))
    config = REPOSITORY / "examples" / "qwen2.5_math_7b" / "config.yaml"
    assert "'--ntasks-per-node=8'" in command
    assert f"'train' '{config}'" in command
    for node in range(4):
        said = [line[3:] for line in log.splitlines() if line.startswith(f"{node}: ")]
        assert said[0] == f"node {node + 1} of 4: node{node + 1}"
        # Quoted, and not evaluated on the way; the weights that the script names are not here.
        assert "'data.system_prompt='\"'\"'a $(exit 9) \"b\" *'\"'\"''" in said[1]
        assert "'model.hf_path=\"models/Qwen2.5-Math-7B-Instruct\"'" in said[1]
        assert any(s.startswith("missing: models/Qwen2.5-Math-7B-Instruct ") for s in said)
        assert "layout: 32 GPUs = TP 4 x PP 1 x DP 8, 8 a node" in said
        assert f"  rank {8 * node + 5}: tensor 1, pipeline 0, data {2 * node + 1}" in said
        assert sum(line.startswith("  rank ") for line in said) == 8
        assert any(line.startswith("FITS: the worst rank") for line in said)
        assert any(re.match(r"rollout: KV cache +\d", line) for line in said)


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
    assert log.splitlines()[-1].startswith("error: ")
    assert "train.num_steps" in log
    assert "Traceback" not in log
    assert "logs are" not in log


def test_a_sweep_without_so_many_combinations(room: JobRoom) -> None:
    options = (*sizes(1, 1), "--array=7")
    job = room.submit("sweep.sh", room.config, options=options, SEEDS="0", SKIP_RATIOS="0 0.5")
    job.end(code=2)
    log = job.log_file.with_name(f"{job.log_file.name}.7").read_text()
    assert "error: --array: task 7, but there are 6 combinations: --array=0-5" in log


def test_every_correction_of_the_shipped_sweep_is_accepted(room: JobRoom) -> None:
    """With the configuration that it names, whose own threshold is of one correction only."""
    options = ("--array=0,3,6", *sizes(1, 8))
    # Of a model's options, only those that say where it comes from stand for its weights.
    job = room.submit("sweep.sh", "--dry-run", "model.dtype=float32", options=options)
    logs = [job.log_file.with_name(f"{job.log_file.name}.{index}") for index in (0, 3, 6)]
    job.wait_for_array(lambda: all(log.exists() and FITS in log.read_text() for log in logs))
    for log in logs:
        assert "model.hf_path=" in log.read_text()


def test_example_settings_are_valid(room: JobRoom) -> None:
    """Copied and not edited, they give what a dry run without them gives."""
    example = Path(__file__).parents[2] / "slurm" / "env.example.sh"
    job = room.submit(
        "train_7b.sh", room.config, "--dry-run", options=sizes(1, 1), NESTED_REFT_ENV=str(example)
    )
    assert "0: layout: 1 GPUs = TP 1 x PP 1 x DP 1, 1 a node" in job.end()
