"""The plan of a study as text and as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.studies.grid import Grid, StudyRun, missing_data
from nested_reft_mcore.studies.prediction import Cluster, Prediction

_HEAD = ("run", "parameters", "skipped", "GPUs", "GB of a GPU", "step", "run", "GPU-hours", "")


def plan_text(grid: Grid, predictions: Mapping[str, Prediction], cluster: Cluster) -> str:
    """For people: a line a run, those that cannot fit struck, and sums."""
    rows = [_row(run, predictions[run.name]) for run in grid.runs]
    rows += [(name, *[""] * 7, f"STRUCK: {reason}") for name, reason in grid.struck]
    return "\n".join([*columns(_HEAD, rows), "", *_sums(grid, predictions, cluster)])


def plan_record(
    grid: Grid, predictions: Mapping[str, Prediction], cluster: Cluster
) -> dict[str, Any]:
    """For programs: bytes and seconds."""
    return {
        "study": grid.study.name,
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu_memory_gb": cluster.gpu_memory_gb or cluster.hardware.memory_gb,
            "hardware": cluster.hardware.model_dump(mode="json"),
        },
        "runs": [
            {
                "name": run.name,
                "point": asdict(run.point),
                "num_steps": run.num_steps,
                "num_skipped": num_skipped(run.config.nested, run.architecture.num_layers),
                "num_layers": run.architecture.num_layers,
                **asdict(predictions[run.name]),
                "gpu_hours": predictions[run.name].gpu_hours,
            }
            for run in grid.runs
        ],
        "struck": [{"name": name, "reason": reason} for name, reason in grid.struck],
        "merged": grid.num_merged,
        "excluded": grid.num_excluded,
    }


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; the first and the last one to the left."""
    widths = [
        max(len(row[i]) for row in [head, *rows]) if i < len(head) - 1 else 0
        for i in range(len(head))
    ]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def count(number: int | None) -> str:
    """Parameters, such as `1.5B`."""
    if number is None:
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def duration(seconds: float | None) -> str:
    """Such as `0.21 s`, `75 s`, `2:05 h`."""
    if seconds is None:
        return "-"
    if seconds < 600:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}:{minutes:02} h"


def _row(run: StudyRun, prediction: Prediction) -> tuple[str, ...]:
    hours = prediction.gpu_hours
    skipped = num_skipped(run.config.nested, run.architecture.num_layers)
    return (
        run.name,
        count(prediction.num_parameters),
        f"{skipped} of {run.architecture.num_layers}",
        str(prediction.gpus or run.point.world_size),
        "-" if prediction.memory_gb is None else f"{prediction.memory_gb:.3g}",
        duration(prediction.step_seconds),
        duration(prediction.seconds),
        "-" if hours is None else f"{hours:,.3g}",
        "" if prediction.fits else f"STRUCK: {prediction.problem}",
    )


def _sums(grid: Grid, predictions: Mapping[str, Prediction], cluster: Cluster) -> list[str]:
    fitting = [predictions[run.name] for run in grid.runs if predictions[run.name].fits]
    hours = sum(p.gpu_hours or 0.0 for p in fitting)
    seconds = sum(p.seconds or 0.0 for p in fitting)
    memory = cluster.gpu_memory_gb or cluster.hardware.memory_gb
    struck = len(grid.runs) - len(fitting) + len(grid.struck)
    lines = [
        f"{len(fitting)} runs, {hours:,.3g} GPU-hours, {duration(seconds)} one after the other; "
        f"{struck} struck, {grid.num_merged} merged with another, {grid.num_excluded} excluded",
        f"on {cluster.hardware.name}, {cluster.nodes} x {cluster.gpus_per_node}, {memory:g} GB "
        "each: predicted times of steps alone, without starts, evaluations and saves",
    ]
    for name in sorted({run.missing for run in grid.runs if run.missing}):
        lines.append(f"not found: {name}; planned with the shape in the configuration")
    lines += [f"not found from here: {path}" for path in missing_data(grid.runs)]
    if 0 not in grid.study.skip_ratios:
        lines.append("skip_ratios has no 0: no speed-ups over full depth in the report")
    return lines
