"""A tiny task and configuration, and the command line as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

import nested_reft_mcore

REPOSITORY = Path(nested_reft_mcore.__file__).parents[1]
LAUNCH_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID"),
)
PIPELINE = "parallel.pipeline_model_parallel_size=2"
PATIENCE_SECONDS = 240.0
"""Machines that run tests are shared."""

CONFIG: dict[str, Any] = {
    "run_dir": "run",
    "seed": 3,
    "model": {
        "architecture": {
            "num_layers": 6,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            "ffn_hidden_size": 64,
            "vocab_size": 41,
            "max_position_embeddings": 32,
            "embedding_init_method_std": 0.2,
        }
    },
    "data": {
        "tokenizer_path": "task/tokenizer.model",
        "train_path": "task/train.jsonl",
        "eval_path": "task/eval.jsonl",
    },
    "sft": {
        "num_steps": 80,
        "micro_batch_size": 12,
        "max_skipped": 1,
        "log_interval": 20,
        "optimizer": {"lr": 1.0e-2, "lr_warmup_steps": 5},
    },
    # A plan is one of four: one of the two inner layers of each stage.
    "nested": {"num_skipped": 2, "check_plan_across_ranks": True},
    "rollout": {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 8, "max_slots": 16},
    # Two updates a step: the second one's ratio is not 1.
    "algorithm": {"objective": "ppo_clip", "rollout_is": "retrace", "clip_ratio_low": 0.05},
    "train": {"num_steps": 8, "updates_per_step": 2, "micro_batch_size": 4},
    "optimizer": {"lr": 1.0e-3},
    "evaluation": {"interval": 2, "num_samples": 2, "num_prompts": 8},
    "checkpoint": {"interval": 2},
}


def write_room(directory: Path) -> None:
    """The generated task under `task/`, and `config.yaml`."""
    script = REPOSITORY / "examples" / "cpu_demo" / "make_task.py"
    sizes = ("--num-train", "24", "--num-eval", "12", "--num-demonstrations", "480")
    subprocess.run(
        [sys.executable, str(script), "--output", str(directory / "task"), *sizes],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    # JSON is YAML.
    (directory / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")


def start(
    room: Path,
    *arguments: str,
    stdout: IO[str] | int = subprocess.PIPE,
    more_path: str = "",
    **environment: str,
) -> subprocess.Popen[str]:
    """Start `nested-reft arguments` in `room`, with more in its environment and Python path."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", ""), more_path])
    return subprocess.Popen(
        [sys.executable, "-m", "nested_reft_mcore", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=room,
        env=clean | {"PYTHONPATH": path} | environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        said = end_family(process)
        raise AssertionError(f"no end after {PATIENCE_SECONDS} seconds:\n{said}") from None
    return process.returncode, out, err


def run(room: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run to the end; stdout and stderr."""
    found, out, err = finish(start(room, *arguments))
    assert found == code, err
    return out, err


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait while the process runs. AssertionError if it leaves or takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"did not get there: {end_family(process)}")
        time.sleep(0.01)


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of `metrics.jsonl`, as far as they are written."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run computed, line by line; lines that hold nothing but times are left out."""
    times = (
        *("time", "perf/throughput", "perf/time_per_step", "perf/generated_tokens_per_second"),
        # These hang on the layout too.
        *("perf/rollout_waiting_share", "perf/kv_cache_gb"),
    )
    kept = [
        {
            k: v
            for k, v in line.items()
            if k not in times and not k.startswith(("timing_s/", "checkpoint/"))
        }
        for line in lines
    ]
    return [line for line in kept if len(line) > 1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that it has started."""
    return psutil.Process(process.pid).children(recursive=True)


def end_family(process: subprocess.Popen[str]) -> str:
    """Kill it and all that it has started; what it has said, without waiting for orphans."""
    doomed = [*family(process), process] if process.poll() is None else []
    for each in doomed:
        with contextlib.suppress(psutil.Error):
            each.kill()
    try:
        out, err = process.communicate(timeout=10)
    except subprocess.TimeoutExpired as expired:
        out, err = expired.output, expired.stderr
    return f"{out}\n{err}"


def find(
    process: subprocess.Popen[str], wanted: Callable[[psutil.Process], bool]
) -> psutil.Process:
    """The first descendant of that kind."""
    for child in family(process):
        # A process that is being started or is gone has no environment.
        with contextlib.suppress(psutil.Error):
            if wanted(child):
                return child
    raise AssertionError("no such process")


def rank_of(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank that a bare start has made."""

    def wanted(child: psutil.Process) -> bool:
        command = " ".join(child.cmdline())
        return child.environ().get("RANK") == str(rank) and "rewards.worker" not in command

    return find(process, wanted)
