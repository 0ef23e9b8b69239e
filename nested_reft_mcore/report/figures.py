"""The curves as PNG files, for papers: one a figure, legible in print and without colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nested_reft_mcore.report.intervals import ACCURACY, accuracy_intervals, is_bound
from nested_reft_mcore.report.page_data import skipped_cells
from nested_reft_mcore.report.run_record import RunRecord

# Okabe and Ito's colours; dashes and markers tell runs apart in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^vDXP"
_PLOTS = (
    ("reward", "critic/rewards/mean", "reward"),
    ("warmup_loss", "sft/loss", "loss, nats per token"),
    ("response_length", "response_length/mean", "response length, tokens"),
    ("tokens_per_second", "perf/generated_tokens_per_second", "generated tokens / s"),
    ("kl", "rollout_corr/kl", "KL(behavior, target), nats per token"),
    ("ess", "nested/ess", "effective sample size, share"),
    ("num_skipped", "nested/num_skipped", "layers or parts skipped"),
)
_PHASES = (
    ("generation", "timing_s/gen"),
    ("reward", "timing_s/reward"),
    ("old log-probs", "timing_s/old_log_prob"),
    ("reference", "timing_s/ref"),
    ("update", "timing_s/update_actor"),
)
DPI = 200


def save_figures(runs: Sequence[RunRecord], directory: Path) -> list[Path]:
    """Draw what the runs have recorded; returns the files.

    Raises OSError where they cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, metric, label in _PLOTS:
        if any(metric in step for run in runs for step in run.steps):
            made.append(
                _save(
                    directory / f"{name}.png", lambda axes, m=metric: _lines(axes, runs, m), label
                )
            )
    accuracies = {m for run in runs for m in run.metrics if m.startswith(ACCURACY)}
    for metric in sorted(m for m in accuracies if not is_bound(m)):
        name = metric.removeprefix(ACCURACY).replace("/", "_").replace("@", "_at_")
        label = f"accuracy, {metric.rpartition('/')[2]}"
        made.append(
            _save(
                directory / f"accuracy_{name}.png",
                lambda axes, m=metric: _accuracy(axes, runs, m),
                label,
            )
        )
    for run in runs:
        stem = run.name.replace("/", "_")
        if any("timing_s/step" in step for step in run.steps):
            made.append(
                _save(
                    directory / f"step_time_{stem}.png",
                    lambda axes, r=run: _stack(axes, r),
                    "seconds per step",
                )
            )
        if any(plan not in ("", "none") for plan in run.plans.values()):
            made.append(
                _save(
                    directory / f"layers_{stem}.png",
                    lambda axes, r=run: _layers(axes, r),
                    "layer",
                    legend=False,
                )
            )
    return made


def _save(path: Path, draw: Callable[[Any], None], label: str, legend: bool = True) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    # Not through pyplot: no state of its process is touched, and no display is looked for.
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="step", ylabel=label)
    draw(axes)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)
    return path


def _column(run: RunRecord, metric: str) -> tuple[list[float], list[float]]:
    known = [(s["step"], s[metric]) for s in run.steps if s.get(metric) is not None]
    return [float(x or 0) for x, _ in known], [float(y or 0) for _, y in known]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _lines(axes: Any, runs: Sequence[RunRecord], metric: str) -> None:
    for index, run in enumerate(runs):
        axes.plot(*_column(run, metric), label=run.name, linewidth=1.4, **_style(index))


def _accuracy(axes: Any, runs: Sequence[RunRecord], metric: str) -> None:
    """With 95 % intervals."""
    for index, run in enumerate(runs):
        steps, values = _column(run, metric)
        intervals = [
            i
            for i, s in zip(accuracy_intervals(run).get(metric, []), run.steps, strict=False)
            if s.get(metric) is not None
        ]
        bounds = [i or (math.nan, math.nan) for i in intervals]
        errors = [
            [v - low for v, (low, _) in zip(values, bounds, strict=True)],
            [high - v for v, (_, high) in zip(values, bounds, strict=True)],
        ]
        axes.errorbar(
            steps,
            values,
            yerr=errors,
            label=run.name,
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            capsize=2,
            linewidth=1.2,
            **_style(index),
        )


def _stack(axes: Any, run: RunRecord) -> None:
    timed = [step for step in run.steps if step.get("timing_s/step") is not None]
    parts = [(label, [step.get(name) or 0.0 for step in timed]) for label, name in _PHASES]
    parts = [(label, values) for label, values in parts if any(values)]
    rest = [
        max(0.0, (step["timing_s/step"] or 0.0) - sum(values[i] for _, values in parts))
        for i, step in enumerate(timed)
    ]
    axes.stackplot(
        [step["step"] for step in timed],
        *(values for _, values in parts),
        rest,
        labels=[*(label for label, _ in parts), "rest"],
        colors=COLOURS,
        alpha=0.85,
    )


def _layers(axes: Any, run: RunRecord) -> None:
    """Share of a layer that each step skipped."""
    from matplotlib.ticker import MaxNLocator

    depth = int(max(step.get("nested/num_layers") or 0 for step in run.steps))
    rows = [
        [{"0": 0.0, "3": 1.0}.get(c, 0.5) for c in skipped_cells(p, depth)]
        for p in run.plans.values()
    ]
    steps = list(run.plans)
    cells = list(map(list, zip(*rows, strict=True)))
    extent = (min(steps) - 0.5, max(steps) + 0.5, depth - 0.5, -0.5)
    axes.imshow(
        cells,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1.25,
        interpolation="nearest",
        extent=extent,
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
