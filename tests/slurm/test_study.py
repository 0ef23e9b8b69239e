"""A scaling study as a job array: submitted, edited meanwhile, watched, and finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from job_cases import JobRoom, Patience
from run_cases import LAUNCH_VARIABLES, REPOSITORY, metrics_of, write_room
from slurm_cluster import SlurmCluster

from nested_reft_mcore.studies.commands import main
from nested_reft_mcore.studies.queue import read_submissions

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NAME = "tiny.skip_0.34.uniform.retrace.tp1_pp1_dp1.seed_5"
TOO_LARGE = "tiny.skip_0.34.uniform.retrace.tp1_pp3_dp1.seed_5"


def write_study(directory: Path, num_steps: int) -> str:
    study = {
        "name": "small",
        "base": "config.yaml",
        "output": str(directory / "study"),
        "equal": "updates",
        "budget": 2 * num_steps,
        "keep_checkpoints": False,
        "sizes": {"tiny": {}},
        "skip_ratios": [0.34],
        "corrections": ["retrace"],
        "layouts": [{}, {"pp": 3}],
        "seeds": [5],
        "overrides": {
            "data.eval_path": None,
            "data.prompt_suffix": " a 'b' \"$(exit 9)\" *",
            "evaluation.interval": 0,
            "logging.tensorboard": False,
        },
        # Three stages are more than there are GPUs.
        "cluster": {"nodes": 1, "gpus_per_node": 2},
    }
    path = directory / "study.yaml"
    path.write_text(json.dumps(study), encoding="utf-8")
    return str(path)


def leave(*arguments: str) -> object:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code


def test_a_study_is_what_it_was_when_it_was_submitted(
    cluster: SlurmCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_room(tmp_path)
    JobRoom(tmp_path, cluster)
    for name in (*LAUNCH_VARIABLES, "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NESTED_REFT_ENV", str(tmp_path / "env.sh"))
    monkeypatch.chdir(REPOSITORY)
    path = write_study(tmp_path, num_steps=2)

    assert leave("submit", path, "--sbatch=--cpus-per-task=1") == 0
    told = capsys.readouterr().out
    assert f"left out: {TOO_LARGE}: does not fit: needs 3 GPUs; 1 x 2 are there" in told
    assert "1 tasks; how far it is: scaling_study.py status" in told
    (submission,) = read_submissions(tmp_path / "study")
    assert submission["runs"] == [NAME]
    assert leave("status", path) == 0
    out = capsys.readouterr().out
    assert f"{NAME}  queued: job {submission['job']}_0" in out or f"{NAME}  running, step" in out
    # Nobody submits it twice.
    assert leave("submit", path) == 0
    assert "nothing to submit" in capsys.readouterr().out

    write_study(tmp_path, num_steps=3)
    patience = Patience(cluster)
    while cluster.call("squeue", "--noheader", f"--jobs={submission['job']}").strip():
        assert patience.lasts()
    log = Path(submission["log"].replace("%A", submission["job"]).replace("%a", "0"))
    run_dir = tmp_path / "study" / NAME
    assert (run_dir / "study.json").exists(), log.read_text()
    steps = [line["step"] for line in metrics_of(run_dir) if "critic/rewards/mean" in line]
    assert steps == [1, 2]
    assert not (run_dir / "checkpoints").exists()
    assert leave("status", path) == 1
    assert "stale: train.num_steps changed since it was run" in capsys.readouterr().out
    write_study(tmp_path, num_steps=2)
    assert leave("status", path) == 0
    assert f"{NAME}  finished" in capsys.readouterr().out
