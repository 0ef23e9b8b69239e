"""What a study keeps of each finished run: one record, enough for tables, plots and calibration."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.report.run_record import RunRecord, read_run
from nested_reft_mcore.studies.grid import StudyRun, tokens_per_step
from nested_reft_mcore.studies.states import STEP_METRIC, read_record, write_aside

RESULTS_FILE = "results.jsonl"
TIMES = ("timing_s/", "perf/")
"""Prefixes of the metrics whose medians are kept."""
VERSIONS = ("torch", "megatron-core")
GREEDY = "/reward/greedy"
SAMPLED = "/reward/mean@"
_ACCURACY = "val-core/"

Row = dict[str, Any]
Metrics = Mapping[str, float | None]


def greedy_accuracy(line: Metrics) -> float | None:
    """Of the full policy, the mean over the sets; None where the line has no evaluation."""
    return _accuracy(line, lambda name: name.endswith(GREEDY))


def sampled_accuracy(line: Metrics) -> float | None:
    """As `greedy_accuracy`, of sampled completions; None also where none were sampled."""
    return _accuracy(line, lambda name: SAMPLED in name and name.rpartition("@")[2].isdigit())


def row_of(run: StudyRun, num_parameters: int | None) -> Row | None:
    """The record of a finished run; None where its metrics hold no step."""
    record = read_run(run.directory, run.name)
    steps = [step for step in record.steps if STEP_METRIC in step]
    if not steps:
        return None
    timed = steps[1:] or steps
    outcome = read_record(run.directory)
    environment = record.environment
    git = environment.get("git") or {}
    versions = environment.get("versions") or {}
    return {
        "name": run.name,
        "run_dir": run.directory.name,
        "point": asdict(run.point),
        "commit": git.get("commit"),
        "changed": git.get("changed"),
        "date": environment.get("time"),
        "machine": _machine(environment),
        "versions": {name: versions.get(name) for name in VERSIONS},
        "parameters": num_parameters,
        "num_layers": run.architecture.num_layers,
        "num_skipped": num_skipped(run.config.nested, run.architecture.num_layers),
        "gpus": run.point.world_size,
        "most_tokens_per_step": tokens_per_step(run.config),
        "num_steps": len(steps),
        "timed_steps": len(timed),
        "generated_tokens": _median(timed, "perf/generated_tokens"),
        "trained_tokens": _median(timed, "perf/total_num_tokens"),
        "medians": medians(timed),
        "kl": _mean(steps, "rollout_corr/kl"),
        "ess": _mean(steps, "nested/ess"),
        "stage_imbalance": _mean(steps, "nested/stage_imbalance"),
        "seconds": None if outcome is None else outcome.seconds,
        "training_seconds": round(_total_seconds(steps), 4),
        "evaluations": _evaluations(record, run.point.world_size),
    }


def medians(steps: Sequence[Metrics]) -> dict[str, float]:
    """The median over the steps of every time and speed, by the metric's name."""
    names = sorted({name for step in steps for name in step if name.startswith(TIMES)})
    found = {name: _median(steps, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A line a run."""
    write_aside(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` has written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    cpu = environment.get("cpu") or {}
    return {
        "processor": cpu.get("model"),
        "cores": cpu.get("count"),
        "memory_gib": cpu.get("memory_gib"),
        "devices": [device.get("name") for device in environment.get("devices") or ()],
        "decode_kernels": environment.get("decode_kernels") or "native",
    }


def _evaluations(record: RunRecord, world_size: int) -> list[Row]:
    """Accuracies after how many steps, seconds of training and GPU-hours."""
    found, seconds = [], 0.0
    for line in record.steps:
        seconds += line.get("timing_s/step") or 0.0
        greedy = greedy_accuracy(line)
        sampled = sampled_accuracy(line)
        if greedy is None and sampled is None:
            continue
        sets = {
            name: value
            for name, value in line.items()
            if name.startswith(_ACCURACY) and value is not None
        }
        found.append(
            {
                "step": line["step"],
                "seconds": round(seconds, 4),
                "gpu_hours": world_size * seconds / 3600,
                "greedy": greedy,
                "sampled": sampled,
                "sets": sets,
            }
        )
    return found


def _accuracy(line: Metrics, counts: Any) -> float | None:
    found = [
        value
        for name, value in line.items()
        if name.startswith(_ACCURACY) and "@skip=" not in name and counts(name)
    ]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known else None


def _total_seconds(steps: Sequence[Metrics]) -> float:
    return sum(step.get("timing_s/step") or 0.0 for step in steps)


def _values(steps: Sequence[Metrics], name: str) -> list[float]:
    return [value for step in steps if (value := step.get(name)) is not None]


def _median(steps: Sequence[Metrics], name: str) -> float | None:
    values = _values(steps, name)
    return _rounded(statistics.median(values)) if values else None


def _mean(steps: Sequence[Metrics], name: str) -> float | None:
    values = _values(steps, name)
    return _rounded(statistics.fmean(values)) if values else None


def _rounded(value: float) -> float:
    """Six significant digits: more than a clock of a shared machine can tell."""
    return float(f"{value:.6g}")
