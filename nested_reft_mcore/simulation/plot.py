"""A simulation as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nested_reft_mcore.config.errors import UserError, reason_of
from nested_reft_mcore.simulation.simulate import Simulation
from nested_reft_mcore.simulation.step import PARTS

COLORS = {
    "generation": "#1f77b4",
    "judging": "#9467bd",
    "logprobs": "#2ca02c",
    "update": "#d95f02",
    "reduction": "#8c564b",
    "optimizer": "#7f7f7f",
    "rest": "#c7c7c7",
}


def plot_simulation(simulation: Simulation, path: Path) -> None:
    """Write a PNG: parts of each step, waiting by stage and replica, and the long tail.

    Raises:
        UserError: it cannot be written.
    """
    figure, axes = new_figure(3, 4.6)
    _plot_parts(axes[0], simulation)
    _plot_waiting(figure, axes[1], simulation)
    _plot_tail(axes[2], simulation)
    save_figure(figure, path, "--plot")


def new_figure(num_panels: int, width: float, height: float = 3.8) -> tuple[Any, Any]:
    """A figure with panels side by side; no window system is asked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, num_panels, squeeze=False)
    return figure, axes[0]


def save_figure(figure: Any, path: Path, option: str) -> None:
    """Write it as PNG. UserError, which names `option`, where it cannot be written."""
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {reason_of(error)}") from None


def _plot_parts(axes: Any, simulation: Simulation) -> None:
    bottom = np.zeros(len(simulation.steps))
    places = np.arange(len(simulation.steps))
    for name in PARTS:
        heights = np.asarray([step.seconds[name] for step in simulation.steps])
        if heights.max() > 0.005 * simulation.step_seconds[0]:
            axes.bar(places, heights, bottom=bottom, color=COLORS[name], label=name)
        bottom += heights
    axes.axhline(simulation.run.time.total, color="black", linestyle="--", label="plan's roofline")
    axes.set(title="a step's parts", xlabel="step", ylabel="seconds", xticks=places)
    axes.legend(fontsize=8)


def _plot_waiting(figure: Any, axes: Any, simulation: Simulation) -> None:
    shares = simulation.waiting()
    whole = shares["inside"] + shares["outside"]
    image = axes.imshow(100 * whole, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="% of the step")
    axes.set(title="waiting", xlabel="stage", ylabel="replica", xticks=range(whole.shape[1]))


def _plot_tail(axes: Any, simulation: Simulation) -> None:
    rounds = simulation.draws[0].rounds
    ends = np.cumsum(rounds.count, axis=1)
    rows = rounds.rows.sum(axis=2)
    order = np.argsort(ends[:, -1])
    for label, replica in (("shortest", order[0]), ("longest", order[-1])):
        axes.step(ends[replica], rows[replica], where="pre", label=f"{label}: replica {replica}")
    axes.set(
        title="sequences that decode", xlabel="round", ylabel="rows of a replica", ylim=(0, None)
    )
    axes.legend(fontsize=8)
