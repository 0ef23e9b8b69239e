"""Overlong filtering through `nested-reft train`: cut completions teach nothing, but count."""

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
    "rollout": {"mode": "full", "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 3},
    "algorithm": {"mask_truncated": True, "kl_reward_coef": 0.5, "advantage": "dr_grpo"},
    "reward": {"name": "evenness.py:evenness"},
    "optimizer": {"lr": 1e-2},
    "train": {"micro_batch_size": 16},
    "evaluation": {"interval": 0},
    "checkpoint": {"interval": 0},
    "logging": {"tensorboard": False},
}
REWARD = """
def evenness(item):
    return float(len(item.completion) % 2)
"""

pytestmark = pytest.mark.usefixtures("keep_logging")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `model`, prompts, a reward and a configuration."""
    monkeypatch.chdir(tmp_path)
    write_model_with_tokenizer(tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", [{"prompt": f"w{n} w4", "answer": n} for n in range(8)])
    (tmp_path / "evenness.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tmp_path


def train(*overrides: str) -> None:
    done = CliRunner().invoke(app, ["train", "config.yaml", "--hf", "model", *overrides])
    shutdown()
    assert done.exit_code == 0, done.output


def test_cut_completions_teach_nothing(room: Path) -> None:
    train("rollout.ignore_eos=true", "train.num_steps=1")
    step = read_lines(room / "run" / "metrics.jsonl")[0]
    assert step["response_length/clip_ratio"] == 1
    assert step["critic/rewards/max"] > step["critic/rewards/min"]
    assert step["actor/grad_norm"] == 0


def test_cut_completions_pay_for_their_kl_among_their_group(room: Path) -> None:
    train("train.num_steps=2")
    rows = read_lines(room / "run" / "rollouts" / "step_000001.dp0.jsonl")
    cut = [row for row in rows if row["finish_reason"] == "length"]
    advantages: dict[tuple[int, float], list[float]] = {}
    for row in cut:
        key = (row["prompt_index"], row["reward"])
        advantages.setdefault(key, []).append(row["advantage"])
    alike = [values for values in advantages.values() if len(values) > 1]
    assert alike
    # The first update has moved the policy: equal scores are left, and unlike KLs.
    assert all(max(values) - min(values) > 1e-4 for values in alike)
