"""Overlong filtering through `nested-reft train`: cut completions teach nothing, and still count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inference_cases import read_lines, write_lines, write_model_with_tokenizer
from typer.testing import CliRunner

from nested_reft_mcore.cli import app
from nested_reft_mcore.mcore.initialize import shutdown

CONFIG = {
    "run_dir": "run",
    "data": {"train_path": "train.jsonl"},
    "rollout": {"mode": "full", "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 2},
    "algorithm": {"kl_reward_coef": 0.5, "advantage": "dr_grpo"},
    "optimizer": {"lr": 1e-2},
    "train": {"num_steps": 2, "micro_batch_size": 8},
    "evaluation": {"interval": 0},
    "checkpoint": {"interval": 0},
    "logging": {"tensorboard": False},
}

pytestmark = pytest.mark.usefixtures("keep_logging")


def test_cut_completions_teach_nothing_and_pay_for_their_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model_with_tokenizer(tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", [{"prompt": f"w{n} w4", "answer": n} for n in range(4)])
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    moved = {}
    for masks in ("false", "true"):
        options = (f"run_dir={masks}", f"algorithm.mask_truncated={masks}", "reward.name=length")
        done = CliRunner().invoke(app, ["train", "config.yaml", "--hf", "model", *options])
        shutdown()
        assert done.exit_code == 0, done.output
        moved[masks] = [m["actor/grad_norm"] for m in read_lines(tmp_path / masks / "metrics.jsonl")]
    print(moved)
