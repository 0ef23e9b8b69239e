"""A small study over a model that is never built, and run directories as `train` leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.load import dump_config
from nested_reft_mcore.studies.grid import Grid, StudyRun, make_grid
from nested_reft_mcore.studies.schema import load_study
from nested_reft_mcore.studies.states import STEP_METRIC

SHAPE: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
CONFIG: dict[str, Any] = {
    "run_dir": "run",
    "model": {"architecture": SHAPE},
    "data": {"train_path": "train.jsonl", "max_prompt_length": 16},
    "rollout": {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 8},
    "train": {"num_steps": 4, "micro_batch_size": 2},
    "evaluation": {"interval": 0},
}
STUDY: dict[str, Any] = {
    "name": "small",
    "base": "config.yaml",
    "output": "runs/small",
    "equal": "updates",
    "sizes": {"tiny": {}},
    "skip_ratios": [0, 0.25],
    "laws": ["uniform", "stage_balanced"],
    "layouts": [{"tp": 1}, {"pp": 2}],
    "cluster": {"nodes": 1, "gpus_per_node": 2},
}


def write_study(directory: Path, **changes: Any) -> Path:
    """The study's file and its base in a directory; `changes` replace keys of the study."""
    (directory / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    path = directory / "study.yaml"
    output = {"output": str(directory / "runs")}
    path.write_text(json.dumps({**STUDY, **output, **changes}), encoding="utf-8")
    return path


def grid_in(directory: Path, **changes: Any) -> Grid:
    path = write_study(directory, **changes)
    return make_grid(load_study(path), path)


def write_run(
    run: StudyRun,
    *,
    steps: int | None = None,
    generation: float = 1.0,
    metrics: Mapping[str, float] | None = None,
    evaluations: Mapping[int, float] | None = None,
) -> None:
    """A run directory with some of its steps; a whole one has its last checkpoint's name.

    `generation`: seconds of a step's generation of 64 tokens; the rest of a step takes 1 s.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    dump_config(run.config, run.directory / "config.yaml")
    environment = {
        "time": "2030-01-02T03:04:05Z",
        "git": {"commit": "0123456789abcdef", "changed": False},
        "cpu": {"model": "A processor", "count": 2, "memory_gib": 8.0},
        "devices": [],
        "decode_kernels": None,
    }
    (run.directory / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    done = run.num_steps if steps is None else steps
    lines = [_line(step, generation, metrics or {}, evaluations or {}) for step in range(done + 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines if len(line) > 2)
    (run.directory / "metrics.jsonl").write_text(text, encoding="utf-8")
    if done == run.num_steps:
        latest = run.directory / "checkpoints" / "latest"
        latest.parent.mkdir(exist_ok=True)
        latest.write_text(f"step_{done:08}", encoding="utf-8")


def _line(
    step: int, generation: float, metrics: Mapping[str, float], evaluations: Mapping[int, float]
) -> dict[str, float]:
    line: dict[str, float] = {"step": step, "time": 1e9 + step}
    if step in evaluations:
        line["val-core/eval/reward/greedy"] = evaluations[step]
        line["val-core/eval/reward/greedy@skip=3"] = 0.0
    if step:
        # The first step is slower: kernels are chosen, memory is fetched.
        seconds = generation * (5 if step == 1 else 1)
        line |= {
            STEP_METRIC: 0.5,
            "timing_s/gen": seconds,
            "timing_s/step": seconds + 1,
            "perf/generated_tokens": 64,
            "perf/total_num_tokens": 128,
            "perf/generated_tokens_per_second": 64 / seconds,
            "rollout_corr/kl": 0.1,
            "nested/ess": 0.9,
            **metrics,
        }
    return line
