"""Layer dropout of updates through `nested-reft train`: drawn anew for each, and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inference_cases import read_lines, write_lines, write_model_with_tokenizer
from run_cases import without_times
from typer.testing import CliRunner

from nested_reft_mcore.cli import app
from nested_reft_mcore.mcore.initialize import shutdown

CONFIG = {
    "run_dir": "run",
    "data": {"train_path": "train.jsonl"},
    "rollout": {"mode": "full", "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 8},
    "train": {"updates_per_step": 2, "micro_batch_size": 8, "max_dropped_layers": 2},
    "evaluation": {"interval": 0},
    "checkpoint": {"interval": 0},
    "logging": {"tensorboard": False},
}

pytestmark = pytest.mark.usefixtures("keep_logging")


def steps(room: Path, name: str, num_steps: int) -> tuple[list[dict[str, Any]], str]:
    """Metrics of a run, gone on with where it is there already, and what was said on stderr."""
    overrides = (f"train.num_steps={num_steps}", f"run_dir={name}")
    done = CliRunner().invoke(app, ["train", "config.yaml", "--hf", "model", *overrides])
    shutdown()
    assert done.exit_code == 0, done.output
    lines = [line for line in read_lines(room / name / "metrics.jsonl") if line["step"] > 0]
    return without_times(lines), done.stderr


def test_each_update_draws_its_layers_and_a_resumed_run_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model_with_tokenizer(tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", [{"prompt": f"w{n} w4", "answer": n} for n in range(4)])
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    whole, said = steps(tmp_path, "whole", 6)
    # Means over the two updates of a step.
    dropped = [line["actor/num_dropped_layers"] for line in whole]
    assert set(dropped) <= {0, 0.5, 1, 1.5, 2}
    assert len(set(dropped)) > 1
    # Updates without layers are off-policy by design, unlike a disagreeing engine.
    assert whole[0]["rollout_corr/k3_kl"] > 1e-4
    assert "every importance ratio is off" not in said
    steps(tmp_path, "resumed", 3)
    assert steps(tmp_path, "resumed", 6)[0] == whole
