"""A probe as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nested_reft_mcore.config.probe_record import ProbeRecord

_NAMES = {"layer": "whole layer", "attention": "attention", "mlp": "MLP"}
_COLORS = {"layer": "#444444", "attention": "#1f77b4", "mlp": "#d95f02"}
_SMALLEST = 1e-5


def plot_probe(record: ProbeRecord, path: str) -> None:
    """Write a PNG: KL by layer and part; predicted and measured KL; laws, if they were compared."""
    # A window system is not to be asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_panels = 3 if record.comparison else 2
    widths = [2.2, 1.2, 1.2][:num_panels]
    figure = Figure(figsize=(4.2 * sum(widths) / 1.3, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, num_panels, width_ratios=widths)
    _plot_parts(axes[0], record)
    _plot_predictions(axes[1], record)
    if record.comparison:
        _plot_comparison(axes[2], record)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)


def _plot_parts(axes: Any, record: ProbeRecord) -> None:
    for name, label in _NAMES.items():
        parts = [part for part in record.parts if part.part == name]
        axes.errorbar(
            [part.layer for part in parts],
            [max(part.kl, _SMALLEST) for part in parts],
            yerr=[part.kl_error for part in parts],
            label=label,
            color=_COLORS[name],
            marker="o",
            markersize=3,
            linewidth=1,
        )
    axes.axhline(record.law.kl_budget, color="grey", linestyle="--", linewidth=1, label="budget")
    axes.set(yscale="log", xlabel="layer", ylabel="KL(nested || full), nats per token")
    axes.set_title("one part skipped alone")
    axes.legend(fontsize=8)


def _plot_predictions(axes: Any, record: ProbeRecord) -> None:
    markers = {"random": ".", "calibration": "x", "held_out": "o"}
    for kind, marker in markers.items():
        plans = [plan for plan in record.plans if plan.kind == kind]
        if plans:
            axes.plot(
                [max(plan.predicted_kl, _SMALLEST) for plan in plans],
                [max(plan.kl, _SMALLEST) for plan in plans],
                marker,
                label=kind.replace("_", " "),
                markersize=5,
            )
    values = [max(v, _SMALLEST) for plan in record.plans for v in (plan.predicted_kl, plan.kl)]
    if values:
        ends = [min(values), max(values)]
        axes.plot(ends, ends, color="grey", linewidth=1)
        axes.legend(fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="predicted KL", ylabel="measured KL")
    axes.set_title("several parts together")


def _plot_comparison(axes: Any, record: ProbeRecord) -> None:
    for law in dict.fromkeys(row.law for row in record.comparison):
        rows = [row for row in record.comparison if row.law == law]
        axes.errorbar(
            [row.speedup for row in rows],
            [max(row.kl, _SMALLEST) for row in rows],
            yerr=[row.kl_error for row in rows],
            label=law,
            marker="s" if law == "sensitivity" else "o",
            markersize=4,
            linewidth=2 if law == "sensitivity" else 1,
        )
    axes.set(yscale="log", xlabel="predicted speed-up", ylabel="measured KL")
    axes.set_title("laws")
    axes.legend(fontsize=7)
