"""The curves as PNG files, for papers: one a figure, legible in print and without colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nested_reft_mcore.report.intervals import ACCURACY, Interval, accuracy_intervals, is_bound
from nested_reft_mcore.report.page_data import skipped_cells
from nested_reft_mcore.report.run_record import RunRecord

# Okabe and Ito's colours; dashes and markers tell runs apart in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_GREYS = ("#999999", "#555555", "#cccccc")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^vDXP"
_PLOTS = (
    ("reward", "critic/rewards/mean", "reward"),
    ("warmup_loss", "sft/loss", "loss, nats per token"),
    ("response_length", "response_length/mean", "response length, tokens"),
    ("truncated", "response_length/clip_ratio", "truncated responses, share"),
    ("tokens_per_second", "perf/generated_tokens_per_second", "generated tokens / s"),
    ("throughput", "perf/throughput", "tokens / s and process"),
    ("kl", "rollout_corr/kl", "KL(behavior, target), nats per token"),
    ("ess", "nested/ess", "effective sample size, share"),
    ("ratio_p05", "nested/ratio_p05", "5th percentile of min(r, 1/r)"),
    ("num_skipped", "nested/num_skipped", "layers or parts skipped"),
    ("entropy", "actor/entropy", "entropy, nats per token"),
    ("grad_norm", "actor/grad_norm", "gradient norm before clipping"),
    ("skipped_updates", "training/skipped_updates", "updates skipped so far"),
    ("reward_timeouts", "reward/timeouts", "reward timeouts so far"),
    ("reward_errors", "reward/errors", "reward errors so far"),
)
_ONLY_IF_ANY = ("skipped_updates", "reward_timeouts", "reward_errors")
"""Drawn where something went wrong."""
_PHASES = (
    ("generation", "timing_s/gen"),
    ("reward", "timing_s/reward"),
    ("old log-probs", "timing_s/old_log_prob"),
    ("reference", "timing_s/ref"),
    ("update", "timing_s/update_actor"),
    ("diagnostics", "timing_s/diagnostics"),
)
_AROUND = (("evaluation", "timing_s/testing"), ("saving", "timing_s/save_checkpoint"))
"""Between the steps, on top of them."""
DPI = 200
_FEW_POINTS = 2000


_MARGINS = {"left": 0.18, "right": 0.97, "bottom": 0.165, "top": 0.955}
"""Shares of the figure. Tick labels have six characters at most, so nothing need be measured."""

Draw = Callable[[Any], None]
"""Puts one run's or all runs' values on axes."""


def save_figures(runs: Sequence[RunRecord], directory: Path) -> list[Path]:
    """Draw what the runs have recorded; returns the files.

    Raises OSError where they cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sheet = _Sheet(directory)
    for name, metric, label in _PLOTS:
        values = [step[metric] for run in runs for step in run.steps if metric in step]
        if any(values) or (values and name not in _ONLY_IF_ANY):
            sheet.save(name, lambda axes, m=metric: _lines(axes, runs, m), label)
    # Once a run: they may be counted from the files of all its evaluations.
    intervals = [accuracy_intervals(run) for run in runs]
    accuracies = {m for run in runs for m in run.metrics if m.startswith(ACCURACY)}
    for metric in sorted(m for m in accuracies if not is_bound(m)):
        name = metric.removeprefix(ACCURACY).replace("/", "_").replace("@", "_at_")
        of_runs = [found.get(metric, []) for found in intervals]
        sheet.save(
            f"accuracy_{name}",
            lambda axes, m=metric, of=of_runs: _accuracy(axes, runs, m, of),
            _accuracy_label(metric),
        )
    for run in runs:
        stem = run.name.replace("/", "_")
        if any("timing_s/step" in step for step in run.steps):
            draw = partial(_stack, run=run)
            sheet.save(f"step_time_{stem}", draw, "seconds per step", legend=False)
        if any(plan not in ("", "none") for plan in run.plans.values()):
            sheet.save(f"layers_{stem}", lambda axes, r=run: _layers(axes, r), "layer", False)
    return sheet.made


def _accuracy_label(metric: str) -> str:
    """`val-core/<set>/<measure>/<statistic>`; a mean `reward` is an accuracy."""
    _, dataset, *rest = metric.split("/")
    measure, statistic = (rest[0], "/".join(rest[1:])) if len(rest) > 1 else ("reward", rest[-1])
    return f"{'accuracy' if measure == 'reward' else measure} on {dataset}, {statistic}"


class _Sheet:
    """One figure, on which picture after picture is drawn."""

    def __init__(self, directory: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._directory = directory
        self._figure = Figure(figsize=(4.6, 3.0))
        # Not through pyplot: no state of its process is touched, and no display is looked for.
        FigureCanvasAgg(self._figure)
        self.made: list[Path] = []
        """The files that were written."""

    def save(self, name: str, draw: Draw, label: str, legend: bool = True) -> None:
        """Draw one picture and write it."""
        self._figure.clear()
        axes = self._figure.subplots(gridspec_kw=_MARGINS)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        # The longest label is as long as the axis.
        axes.set_ylabel(label, fontsize=9)
        axes.ticklabel_format(scilimits=(-3, 4))
        draw(axes)
        if legend and axes.get_legend_handles_labels()[0]:
            # A fixed corner: looking for the emptiest one compares every point.
            axes.legend(frameon=False, fontsize=8, loc="best" if _is_small(axes) else "upper left")
        path = self._directory / f"{name}.png"
        self._figure.savefig(path, dpi=DPI, pil_kwargs={"compress_level": 3})
        self.made.append(path)


def _is_small(axes: Any) -> bool:
    return sum(len(line.get_xdata()) for line in axes.lines) <= _FEW_POINTS


def _column(run: RunRecord, metric: str) -> tuple[list[float], list[float]]:
    known = [(s["step"], s[metric]) for s in run.steps if s.get(metric) is not None]
    return [float(x or 0) for x, _ in known], [float(y or 0) for _, y in known]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _lines(axes: Any, runs: Sequence[RunRecord], metric: str) -> None:
    for index, run in enumerate(runs):
        axes.plot(*_column(run, metric), label=run.name, linewidth=1.4, **_style(index))


def _accuracy(
    axes: Any,
    runs: Sequence[RunRecord],
    metric: str,
    intervals_of_runs: Sequence[Sequence[Interval | None]],
) -> None:
    """With 95 % intervals."""
    for index, (run, found) in enumerate(zip(runs, intervals_of_runs, strict=True)):
        steps, values = _column(run, metric)
        intervals = [i for i, s in zip(found, run.steps, strict=False) if s.get(metric) is not None]
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
    around = [(label, [step.get(name) or 0.0 for step in timed]) for label, name in _AROUND]
    parts += [("rest of the step", rest), *(part for part in around if any(part[1]))]
    axes.stackplot(
        [step["step"] for step in timed],
        *(values for _, values in parts),
        labels=[label for label, _ in parts],
        colors=[*COLOURS, *_GREYS],
        alpha=0.85,
    )
    # Room for the legend above the data.
    axes.set_ylim(0, 1.5 * max(sum(column) for column in zip(*(v for _, v in parts), strict=True)))
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


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
