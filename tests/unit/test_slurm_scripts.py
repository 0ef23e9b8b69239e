"""Each training script asks for machines that its own configuration fits on, by the memory plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nested_reft_mcore
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.planning.report import plan_report
from nested_reft_mcore.planning.run_plan import make_plan

REPOSITORY = Path(nested_reft_mcore.__file__).parents[1]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("train_*.sh"))
DIRECTIVES = ("--requeue", "--open-mode=append")


def test_there_is_a_script_for_each_size() -> None:
    assert [path.stem for path in SCRIPTS] == ["train_1.5b", "train_32b", "train_70b", "train_7b"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_asks_for_is_enough(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("USR1@")
    assert all(f"#SBATCH {name}\n" in text for name in DIRECTIVES)
    match = re.search(r"^train_job (\S+) (models/\S+) ", text, flags=re.MULTILINE)
    assert match is not None
    path = REPOSITORY / match[1]
    # The weights that the configuration tells to take.
    assert f"--hf {match[2]}`" in path.read_text(encoding="utf-8")
    plan = make_plan(load_config(path, ()), int(asked["nodes"]), int(asked["gpus-per-node"]))
    assert plan.fits, plan_report(plan)
