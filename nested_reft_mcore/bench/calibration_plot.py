"""Predicted against measured, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nested_reft_mcore.planning.calibration_check import Check
from nested_reft_mcore.planning.calibration_points import Row
from nested_reft_mcore.simulation.plot import new_figure, save_figure

# Okabe and Ito's colours, which people see apart whatever their eyes.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "os^vDXP"
_BAND = 0.15


def plot_check(check: Check, path: Path) -> None:
    """Write a PNG: a step's, a generation's and an update's seconds, point by point.

    Colours tell models apart, markers the number of stages.

    Raises:
        UserError: it cannot be written.
    """
    figure, axes = new_figure(3, 4.2)
    panels = (("step", None), ("generation", "generation"), ("update", "update"))
    for place, (title, part) in enumerate(panels):
        _panel(axes[place], check.rows, part)
        axes[place].set(title=title, xlabel="seconds measured", ylabel="seconds predicted")
    axes[0].legend(fontsize=8, frameon=False)
    save_figure(figure, path, "--plot")


def _panel(axes: Any, rows: tuple[Row, ...], part: str | None) -> None:
    sizes = sorted({row.point.key[0] for row in rows})
    stages = sorted({row.point.runs[0].layout.pipeline for row in rows})
    ends: list[float] = []
    for size in sizes:
        for stage in stages:
            pairs = [
                _pair(row, part)
                for row in rows
                if row.point.key[0] == size and row.point.runs[0].layout.pipeline == stage
            ]
            pairs = [pair for pair in pairs if min(pair) > 0]
            if not pairs:
                continue
            ends += [end for pair in pairs for end in pair]
            measured, predicted = zip(*pairs, strict=True)
            axes.plot(
                measured,
                predicted,
                _MARKERS[stages.index(stage) % len(_MARKERS)],
                color=_COLORS[sizes.index(size) % len(_COLORS)],
                markersize=5,
                alpha=0.8,
                label=f"{_number(size)} parameters, {stage} stage{'s' * (stage > 1)}",
            )
    if ends:
        span = [min(ends) / 1.2, max(ends) * 1.2]
        axes.plot(span, span, color="#888888", linewidth=1)
        low, high = ([end * (1 + sign * _BAND) for end in span] for sign in (-1, 1))
        axes.fill_between(span, low, high, color="#888888", alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")


def _pair(row: Row, part: str | None) -> tuple[float, float]:
    if part is None:
        return row.point.step_seconds, row.predicted_step
    return row.point.seconds[part], row.predicted[part]


def _number(parameters: float) -> str:
    return f"{parameters / 1e6:.3g}M"
