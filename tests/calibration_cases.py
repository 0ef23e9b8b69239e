"""Runs that were never made: steps timed by the performance model itself, with noise."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nested_reft_mcore
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.config.yaml_reader import write_yaml
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.planning.hardware import Assumptions, HardwareProfile
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.measured_run import MeasuredRun, measured_run
from nested_reft_mcore.planning.skip_gain import skip_plans

DEMO = Path(nested_reft_mcore.__file__).parents[1] / "examples" / "cpu_demo" / "config.yaml"
TRUTH = HardwareProfile(
    name="truth",
    memory_gb=12,
    peak_tflops=0.05,
    peak_tflops_float32=0.05,
    memory_gb_per_s=8,
    node_link_gb_per_s=1,
    network_gb_per_s=1,
    host_link_gb_per_s=5,
    kernels="cpu",
    product_shares=((1, 0.1), (8, 0.5), (64, 0.9)),
    busy_processes=2,
    busy_compute_share=0.9,
    assumptions=Assumptions(
        decode_matmul_efficiency=0.6,
        layer_overhead_us=500,
        pass_overhead_us=900,
        row_overhead_us=15,
        message_latency_us=150,
        message_overhead_us=400,
        matmul_efficiency=0.55,
        update_layer_overhead_us=800,
        micro_batch_overhead_us=3000,
        activation_traffic=3,
        optimizer_efficiency=0.3,
        update_overhead_ms=8,
        reward_seconds=2e-4,
        step_overhead_ms=6,
        prompt_fill=1.0,
        response_fill=1.0,
    ),
)
START = TRUTH.model_copy(
    update={
        "name": "start",
        "busy_compute_share": 0.95,
        "assumptions": Assumptions(layer_overhead_us=50, matmul_efficiency=0.9),
    }
)
SIZES = ((64, 176), (160, 448), (320, 896))


def overrides(size: tuple[int, int], stages: int, skipped: int, law: str, seed: int) -> list[str]:
    """Of one run of a study."""
    hidden, ffn = size
    return [
        f"model.architecture.hidden_size={hidden}",
        f"model.architecture.ffn_hidden_size={ffn}",
        f"parallel.pipeline_model_parallel_size={stages}",
        f"nested.num_skipped={skipped}",
        f"nested.law={law}",
        f"seed={seed}",
        "data.max_prompt_length=11",
        "rollout.prompts_per_step=8",
        "train.micro_batch_size=16",
    ]


def timed_lines(
    name: str, options: Sequence[str], truth: HardwareProfile, noise: float, num_steps: int
) -> tuple[Config, int, list[dict[str, float]], dict[int, str]]:
    """Configuration, processes, metrics and plans of a run that takes what `truth` says."""
    config = load_config(DEMO, options)
    stages = config.parallel.pipeline_model_parallel_size
    layout = Layout.of(model_architecture(config.model), config.parallel, 1, stages)
    drawn = skip_plans(config, layout)
    plans = {step + 1: drawn[step % len(drawn)] for step in range(num_steps)}
    texts = {step: plan.describe() for step, plan in plans.items()}
    blank = [_line(step, config, {"step": 1.0}) for step in range(1, 3)]
    bare = measured_run(name, config, stages, stages, blank, texts | {2: texts[1]})
    model, fixed = bare.model(truth), bare.predict(truth)
    rng = np.random.default_rng([ord(letter) for letter in name])
    lines = []
    for step, plan in plans.items():
        parts = {"gen": model.decode.seconds(plan), "update_actor": fixed.update}
        parts = {part: value * math.exp(noise * rng.normal()) for part, value in parts.items()}
        lines.append(_line(step, config, parts | {"step": sum(parts.values()) + fixed.rest}))
    return config, stages, lines, texts


def made_run(
    name: str,
    *options: str,
    truth: HardwareProfile = TRUTH,
    noise: float = 0.0,
    num_steps: int = 5,
    changes: dict[str, float] | None = None,
) -> MeasuredRun:
    """Such a run as calibration has it; `changes` are put into every line."""
    config, stages, lines, texts = timed_lines(name, options, truth, noise, num_steps)
    lines = [line | (changes or {}) for line in lines]
    return measured_run(name, config, stages, stages, lines, texts)


def write_run(directory: Path, *options: str, truth: HardwareProfile = TRUTH) -> None:
    """A run directory, as far as calibration reads it."""
    config, stages, lines, texts = timed_lines(directory.name, options, truth, 0.01, 4)
    write_yaml(directory / "config.yaml", config.model_dump(mode="json"))
    (directory / "environment.json").write_text(json.dumps({"world_size": stages}))
    with (directory / "metrics.jsonl").open("w") as file:
        for line in lines:
            step = int(line["step"])
            file.write(json.dumps(line | {"step": step, "nested/plan": texts[step]}) + "\n")


def study(noise: float = 0.0, truth: HardwareProfile = TRUTH) -> list[MeasuredRun]:
    """Three sizes, one and two stages, three skip ratios, two laws."""
    runs = []
    for size in SIZES:
        for stages in (1, 2):
            for skipped in (0, 3, 6):
                for law in ("uniform", "stage_balanced") if skipped else ("uniform",):
                    name = f"{size[0]}.pp{stages}.skip{skipped}.{law}.seed0"
                    options = overrides(size, stages, skipped, law, 0)
                    runs.append(made_run(name, *options, truth=truth, noise=noise))
    return runs


def _line(step: int, config: Any, seconds: dict[str, float]) -> dict[str, float]:
    limit, sequences = config.rollout.max_new_tokens, 8 * config.rollout.group_size
    line: dict[str, float] = {f"timing_s/{name}": value for name, value in seconds.items()}
    for which in ("mean", "min", "max"):
        line |= {f"prompt_length/{which}": 11.0, f"response_length/{which}": float(limit)}
    return line | {"step": float(step), "perf/total_num_tokens": sequences * (11.0 + limit)}
