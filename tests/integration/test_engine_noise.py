"""A run whose rollouts have to be on-policy says so where its engine and its forward disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inference_cases import read_lines, write_lines, write_model_with_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from nested_reft_mcore.cli import app
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.initialize import shutdown
from nested_reft_mcore.training import run
from nested_reft_mcore.training.ratio_split import ENGINE_NOISE_LIMITS

CONFIG = {
    "run_dir": "run",
    "data": {"train_path": "train.jsonl"},
    "rollout": {"mode": "full", "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 8},
    "train": {"num_steps": 1, "micro_batch_size": 8},
    "evaluation": {"interval": 0},
    "checkpoint": {"interval": 0},
    "diagnostics": {"split_every": 1},
    "logging": {"tensorboard": False},
}

pytestmark = pytest.mark.usefixtures("keep_logging")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, prompts and a configuration."""
    directory = tmp_path_factory.mktemp("engine")
    write_model_with_tokenizer(directory / "model")
    write_lines(directory / "train.jsonl", [{"prompt": f"w{n} w4", "answer": n} for n in range(4)])
    (directory / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    return directory


def first_step(room: Path, dtype: str, name: str) -> tuple[dict[str, float], str]:
    """Metrics of the only step of a run, and what was said on stderr."""
    overrides = (f"model.dtype={dtype}", f"run_dir={name}")
    done = CliRunner().invoke(app, ["train", "config.yaml", "--hf", "model", *overrides])
    shutdown()
    assert done.exit_code == 0, done.output
    return next(m for m in read_lines(room / name / "metrics.jsonl") if m["step"] == 1), done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_warns_where_the_engine_disagrees_and_only_there(
    room: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(room)
    # No coefficient asks for a reference policy: nobody may copy the weights.
    monkeypatch.setattr(run, "ReferencePolicy", None)
    limit = ENGINE_NOISE_LIMITS[dtype]
    metrics, said = first_step(room, dtype, f"{dtype}_sound")
    assert metrics["nested/num_skipped"] == 0
    assert abs(metrics["rollout_corr/k3_kl"]) < limit
    assert "every importance ratio is off" not in said

    exact = PolicyDecoder._logits

    def sharper(self: PolicyDecoder, hidden: Tensor) -> Tensor:
        """What an engine gives that forgets a temperature of 2."""
        return 2 * exact(self, hidden)

    monkeypatch.setattr(PolicyDecoder, "_logits", sharper)
    metrics, said = first_step(room, dtype, f"{dtype}_broken")
    assert metrics["rollout_corr/k3_kl"] > limit
    assert "every importance ratio is off" in said
    # With nothing skipped and one update all of it is the engine's.
    assert metrics["nested/kl_engine"] == pytest.approx(metrics["rollout_corr/kl"], rel=1e-5)
    assert metrics["nested/kl_skip"] == pytest.approx(0, abs=1e-7)
