"""However the same run is launched, it computes the same: 2 tensor x 2 pipeline processes.

Two jobs of Slurm on the same two nodes at the same time, one task per GPU in one and a torchrun on
each node in the other; mpirun; and, to compare with, a start on this machine without any of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hf_cases import read_tensors
from job_cases import Job, JobRoom, sizes
from mpi_cases import KINDS, find_mpirun, finish
from run_cases import REPOSITORY, metrics_of, run, without_times, write_room

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NUM_STEPS = 3
OVERRIDES = (
    # Two heads of keys and values, that tensor parallelism can share.
    "model.architecture.num_query_groups=2",
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    f"train.num_steps={NUM_STEPS}",
    "evaluation.interval=3",
    "checkpoint.interval=0",
    "logging.tensorboard=false",
)
TWO_NODES = sizes(2, 2, "--nodelist=node[1-2]")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return directory


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[dict[str, Any]]:
    """Metrics of a bare start, which makes the four processes itself."""
    run(directory, "train", "config.yaml", *OVERRIDES, "run_dir=bare")
    lines = without_times(metrics_of(directory / "bare"))
    assert [line["step"] for line in lines] == [0, *range(1, NUM_STEPS + 1)]
    return lines


@pytest.fixture(scope="module")
def room(directory: Path, request: pytest.FixtureRequest) -> JobRoom:
    return JobRoom(directory, request.getfixturevalue("cluster"))


@pytest.fixture(scope="module")
def jobs(room: JobRoom) -> dict[str, Job]:
    """Two at the same time on the same nodes."""
    return {
        launcher: room.submit(
            "train_7b.sh",
            room.config,
            *OVERRIDES,
            f"run_dir=by_{launcher}",
            options=TWO_NODES,
            LAUNCHER=launcher,
        )
        for launcher in ("srun", "torchrun")
    }


@pytest.mark.slurm
def test_two_jobs_on_the_same_nodes(jobs: dict[str, Job], expected: list[dict[str, Any]]) -> None:
    logs = {launcher: job.end() for launcher, job in jobs.items()}
    masters = set()
    for launcher, log in logs.items():
        match = re.search(rf"restart 0, .*: 2 x 2 tasks on node\[1-2\], by {launcher}, (.*)", log)
        assert match is not None, log
        masters.add(match.group(1))
    assert all(re.fullmatch(r"master node1:\d+", master) for master in masters)
    assert len(masters) == 2
    spans = [(job.shows("StartTime"), job.shows("EndTime")) for job in jobs.values()]
    assert max(start for start, _ in spans) < min(end for _, end in spans), spans


@pytest.mark.slurm
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_metrics_of_slurm_are_those_of_a_bare_start(
    room: JobRoom, jobs: dict[str, Job], expected: list[dict[str, Any]], launcher: str
) -> None:
    log = jobs[launcher].end()
    run_dir = room.directory / f"by_{launcher}"
    assert without_times(metrics_of(run_dir)) == expected
    # Rank 0 is on the console; every task has a file of its own.
    assert "train 3/3" in log
    unit, count = {"srun": ("rank", 4), "torchrun": ("node", 2)}[launcher]
    found = sorted(path.name for path in run_dir.glob(f"logs/job_*.0/train.{unit}_*.log"))
    assert found == [f"train.{unit}_{number:03d}.log" for number in range(count)]


@pytest.mark.slurm
def test_converting_and_evaluating(room: JobRoom, jobs: dict[str, Job]) -> None:
    """What the first job has trained goes to Hugging Face and is judged, at another layout."""
    jobs["srun"].end()
    checkpoints = room.directory / "by_srun" / "checkpoints"
    output = room.directory / "converted"
    convert = room.submit(
        "convert.sh",
        *("mcore-to-hf", "--checkpoint", str(checkpoints), "--output", str(output)),
        options=("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"),
    )
    figures = room.directory / "accuracy.json"
    evaluate = room.submit(
        "evaluate.sh",
        *(room.config, "--checkpoint", str(checkpoints), "--output", str(figures)),
        *("run_dir=judged", "model.architecture=null"),
        options=sizes(1, 1),
    )
    convert.end()
    evaluate.end()
    assert read_tensors(output)
    greedy = "val-core/eval/reward/greedy"
    last = [line for line in metrics_of(room.directory / "by_srun") if greedy in line][-1]
    assert last["step"] == NUM_STEPS
    found = json.loads(figures.read_text())["metrics"]
    assert found[greedy] == last[greedy]
    length = "val-aux/eval/response_length/greedy"
    assert found[length] == last[length]


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_mpirun_are_those_of_a_bare_start(
    directory: Path, expected: list[dict[str, Any]], kind: str
) -> None:
    mpirun = find_mpirun(kind)
    if isinstance(mpirun, str):
        pytest.skip(mpirun)
    script = REPOSITORY / "examples" / "mpi" / "run.sh"
    process = subprocess.Popen(
        [str(script), "4", "config.yaml", *OVERRIDES, f"run_dir=by_{kind}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=mpirun.environment(MPIRUN=mpirun.command, PYTHON=sys.executable, OVERSUBSCRIBE="1"),
    )
    code, _, err = finish(process)
    assert code == 0, err
    assert without_times(metrics_of(directory / f"by_{kind}")) == expected
