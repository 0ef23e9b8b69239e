"""One row a point of the grid: means over its seeds, and speed-ups against full depth."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nested_reft_mcore.studies.plan_table import count
from nested_reft_mcore.studies.results import Row
from nested_reft_mcore.studies.student import Estimate, estimate

SEED = "seed"
MEASURES = (
    "tokens_per_second",
    "generation_speedup",
    "step_seconds",
    "step_speedup",
    "generation_share",
    "step_tokens_per_second",
    "kl",
    "ess",
    "accuracy_first",
    "accuracy_last",
    "gpu_hours",
)
"""What is averaged over seeds; absent where no seed has it."""
_HEAD = (
    "size",
    "parameters",
    "layout",
    "skipped",
    "law",
    "correction",
    "seeds",
    "generated tokens/s",
    "generation speed-up",
    "step, s",
    "step speed-up",
    "generation in the step",
    "KL, nats",
    "ESS",
    "accuracy",
    "GPU-hours",
)


@dataclass(frozen=True)
class PointRow:
    """A point of the grid without its seed."""

    point: Mapping[str, Any]
    rows: Sequence[Row]
    """One a seed."""
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of each seed that has one."""

    @property
    def gpus(self) -> int:
        """Processes of each run."""
        return self.rows[0]["gpus"]

    @property
    def share_skipped(self) -> float:
        """Layers skipped over layers."""
        return self.rows[0]["num_skipped"] / self.rows[0]["num_layers"]

    @property
    def layout(self) -> str:
        """Such as `PP 2`; `1 process` where nothing is spread."""
        point = self.point
        parts = [f"{n.upper()} {point[n]}" for n in ("tp", "pp", "dp") if point[n] > 1]
        told = " x ".join(parts) or "1 process"
        return f"{told} ({point['variant']})" if point["variant"] else told

    def mean(self, measure: str) -> float | None:
        """Over the seeds; None where there is none."""
        found = self.estimates.get(measure)
        return None if found is None else found.mean


def table_of(rows: Sequence[Row]) -> list[PointRow]:
    """The finished runs by point, in the order in which they stand."""
    full = {_key(row): row for row in rows if row["point"]["skip_ratio"] == 0}
    points: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        point = {k: v for k, v in row["point"].items() if k != SEED}
        points.setdefault(tuple(point.items()), []).append(row)
    return [_point_row(dict(key), found, full) for key, found in points.items()]


def speedups(row: Row, full: Row) -> tuple[float | None, float | None]:
    """Of generation and of the step, at equal generated tokens: ratios of tokens a second."""
    return (
        _ratio(tokens_per_second(row), tokens_per_second(full)),
        _ratio(step_tokens_per_second(row), step_tokens_per_second(full)),
    )


def tokens_per_second(row: Row) -> float | None:
    """Response tokens a second of generation, of all replicas."""
    return row["medians"].get("perf/generated_tokens_per_second")


def step_tokens_per_second(row: Row) -> float | None:
    """Response tokens a second of the whole step, of all replicas."""
    return _ratio(row["generated_tokens"], row["medians"].get("timing_s/step"))


@dataclass(frozen=True)
class SeedSpread:
    """How far apart the seeds of a point lie: the largest value over the smallest, less 1."""

    median: float
    largest: float
    num_points: int
    """Points with two seeds or more."""
    most_seeds: int

    @classmethod
    def of(cls, table: Sequence[PointRow], measure: str) -> SeedSpread | None:
        """Of one of `MEASURES`; None where no point has two seeds."""
        found = [values for row in table if len(values := row.values.get(measure, ())) > 1]
        if not found:
            return None
        shares = [max(values) / min(values) - 1 for values in found]
        most = max(len(values) for values in found)
        return cls(statistics.median(shares), max(shares), len(found), most)


def csv_text(table: Sequence[PointRow]) -> str:
    """Every figure with half its interval, for programs."""
    axes = [name for name in table[0].point] if table else []
    names = [name for measure in MEASURES for name in (measure, f"{measure}_half")]
    head = [*axes, "parameters", "gpus", "num_skipped", "num_layers", "seeds", *names]
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for entry in table:
        first = entry.rows[0]
        record: dict[str, Any] = {**entry.point, "seeds": len(entry.rows), "gpus": entry.gpus}
        record |= {name: first[name] for name in ("parameters", "num_skipped", "num_layers")}
        for measure, found in entry.estimates.items():
            record[measure] = f"{found.mean:.6g}"
            record[f"{measure}_half"] = "" if found.half is None else f"{found.half:.4g}"
        writer.writerow({k: "" if v is None else v for k, v in record.items()})
    return text.getvalue()


def markdown(table: Sequence[PointRow]) -> str:
    """The table for people; columns in which nothing stands are left out."""
    cells = [_cells(entry) for entry in table]
    shown = [i for i in range(len(_HEAD)) if any(row[i] for row in cells)]
    lines = [[_HEAD[i] for i in shown], ["---"] * len(shown)]
    lines += [[row[i] for i in shown] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _key(row: Row) -> tuple[Any, ...]:
    """What a run has in common with the full-depth run that it is compared with."""
    return tuple(row["point"][name] for name in ("size", "tp", "pp", "dp", "variant", SEED))


def _point_row(
    point: dict[str, Any], rows: list[Row], full: Mapping[tuple[Any, ...], Row]
) -> PointRow:
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for row in rows:
        for measure, value in _measures(row, full.get(_key(row))).items():
            if value is not None:
                values[measure].append(value)
    estimates = {measure: estimate(found) for measure, found in values.items() if found}
    return PointRow(point, rows, estimates, values)


def _measures(row: Row, full: Row | None) -> dict[str, float | None]:
    medians, evaluations = row["medians"], row["evaluations"]
    step = medians.get("timing_s/step")
    generation, whole = (None, None) if full is None else speedups(row, full)
    return {
        "tokens_per_second": tokens_per_second(row),
        "generation_speedup": generation,
        "step_seconds": step,
        "step_speedup": whole,
        "generation_share": _ratio(medians.get("timing_s/gen"), step),
        "step_tokens_per_second": step_tokens_per_second(row),
        "kl": row["kl"],
        "ess": row["ess"],
        "accuracy_first": accuracy(evaluations[0]) if len(evaluations) > 1 else None,
        "accuracy_last": accuracy(evaluations[-1]) if evaluations else None,
        "gpu_hours": row["gpus"] * row["training_seconds"] / 3600,
    }


def accuracy(evaluation: Mapping[str, Any]) -> float | None:
    """Of sampled completions, which many draws make steadier, else of greedy ones."""
    sampled = evaluation["sampled"]
    return evaluation["greedy"] if sampled is None else sampled


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _cells(entry: PointRow) -> list[str]:
    first, point = entry.rows[0], entry.point
    change = _cell(entry, "accuracy_last", "{:.3f}")
    if entry.mean("accuracy_first") is not None:
        change = f"{entry.mean('accuracy_first'):.3f} -> {change}"
    return [
        str(point["size"]),
        count(first["parameters"]),
        entry.layout,
        f"{first['num_skipped']} of {first['num_layers']}",
        point["law"] or "",
        point["correction"] or "",
        str(len(entry.rows)),
        _cell(entry, "tokens_per_second", "{:,.0f}"),
        _cell(entry, "generation_speedup", "{:.2f}x"),
        _cell(entry, "step_seconds", "{:.3g}", "{:.2g}"),
        _cell(entry, "step_speedup", "{:.2f}x"),
        _cell(entry, "generation_share", "{:.0%}"),
        _cell(entry, "kl", "{:.3f}"),
        _cell(entry, "ess", "{:.2f}"),
        change,
        _cell(entry, "gpu_hours", "{:.3g}", ""),
    ]


def _cell(entry: PointRow, measure: str, form: str, half_form: str | None = None) -> str:
    """Mean and half interval; none where full depth is compared with itself, or without a form."""
    found = entry.estimates.get(measure)
    if found is None:
        return ""
    told = form.format(found.mean)
    if told.lstrip("-") == form.format(0):
        told = form.format(0)
    is_reference = found.half == 0 and entry.point["skip_ratio"] == 0
    if half_form == "" or found.half is None or is_reference:
        return told
    return f"{told} ± {(half_form or form).format(found.half)}"
