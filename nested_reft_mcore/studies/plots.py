"""The plots of a study as PNG files, legible in print and without colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.report.figures import COLOURS, DASHES, DPI, MARKERS
from nested_reft_mcore.studies.student import Estimate, estimate
from nested_reft_mcore.studies.table import PointRow, accuracy


@dataclass(frozen=True)
class Series:
    """A line with error bars."""

    label: str
    xs: Sequence[float]
    ys: Sequence[Estimate]


@dataclass(frozen=True)
class Plot:
    """One file: a panel for each group of series."""

    name: str
    title: str
    x_label: str
    y_label: str
    panels: Mapping[str, Sequence[Series]]
    """By size."""
    reference: Callable[[float], float] | None = None
    """A dotted line: what would be ideal."""
    log_x: bool = False
    needs: str = ""
    """What has to be there, for the message where it is not."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(self.panels.values())


def plots_of(table: Sequence[PointRow]) -> list[Plot]:
    """Every plot, those without data too."""
    skips = "finished runs of a size at two skip ratios or more"
    ideal = "layers skipped, share"
    return [
        _over_skip(table, "tokens_per_second", "tokens_per_second", "generated tokens/s", skips),
        Plot(
            "speedup",
            "Generation against full depth",
            ideal,
            "speed-up",
            _panels(table, _skip_series("generation_speedup")),
            reference=lambda share: 1 / (1 - share),
            needs=skips,
        ),
        _over_skip(table, "step_speedup", "step_speedup", "speed-up of the step", skips),
        _over_skip(
            table, "generation_share", "generation_share", "generation, share of the step", skips
        ),
        _scaling(table, "strong_scaling", weak=False),
        _scaling(table, "weak_scaling", weak=True),
        _against_kl(table),
        _over_time(table, "accuracy_wall_time", "seconds", "training, s"),
        _over_time(table, "accuracy_gpu_hours", "gpu_hours", "GPU-hours"),
    ]


def draw(plot: Plot, directory: Path) -> Path:
    """Write the PNG; returns its path. Raises OSError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: series for name, series in plot.panels.items() if series}
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(0.6 + 3.6 * across, 0.5 + 2.7 * down), layout="constrained")
    # Not through pyplot: no state of its process is touched, and no display is looked for.
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    labels = _labels(panels.values())
    handles: dict[str, Any] = {}
    for axes, (name, series) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, plot, name, series, labels, handles)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(plot.title, fontsize=10)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=across,
        frameon=False,
        fontsize=7,
    )
    path = directory / f"{plot.name}.png"
    figure.savefig(path, dpi=DPI)
    return path


def _panel(
    axes: Any,
    plot: Plot,
    name: str,
    series: Sequence[Series],
    labels: Mapping[str, int],
    handles: dict[str, Any],
) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(plot.x_label, fontsize=8)
    axes.set_ylabel(plot.y_label, fontsize=8)
    if plot.log_x:
        _powers_of_two(axes, series)
    for one in series:
        index = labels[one.label]
        handle = axes.errorbar(
            one.xs,
            [y.mean for y in one.ys],
            yerr=[math.nan if y.half is None else y.half for y in one.ys],
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
        handles.setdefault(one.label, handle)
    axes.set_ylim(*_limits(series))
    if plot.reference is not None:
        last = max(x for one in series for x in one.xs)
        xs = [last * i / 40 for i in range(41)]
        ys = [plot.reference(x) for x in xs]
        (handle,) = axes.plot(xs, ys, color="0.5", linestyle=":", linewidth=1)
        handles.setdefault("layers over layers that run", handle)


def _powers_of_two(axes: Any, series: Sequence[Series]) -> None:
    """A logarithmic axis with the numbers of GPUs that there are."""
    numbers = sorted({x for one in series for x in one.xs})
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.minorticks_off()


def _limits(series: Sequence[Series]) -> tuple[float, float]:
    """Of the means, with some room: an interval of three seeds may be far wider, and is cut."""
    means = [y.mean for one in series for y in one.ys]
    span = (max(means) - min(means)) or abs(max(means)) or 1.0
    low = min(means) - 0.4 * span
    return (max(low, 0.0) if min(means) >= 0 else low), max(means) + 0.4 * span


def _labels(panels: Iterable[Sequence[Series]]) -> dict[str, int]:
    """One look for a label in all panels."""
    found: dict[str, int] = {}
    for series in panels:
        for one in series:
            found.setdefault(one.label, len(found))
    return found


Maker = Callable[[Sequence[PointRow]], list[Series]]


def _panels(table: Sequence[PointRow], make: Maker) -> dict[str, list[Series]]:
    sizes = dict.fromkeys(entry.point["size"] for entry in table)
    return {size: make([entry for entry in table if entry.point["size"] == size]) for size in sizes}


def _over_skip(table: Sequence[PointRow], name: str, measure: str, label: str, needs: str) -> Plot:
    title = label[0].upper() + label[1:]
    panels = _panels(table, _skip_series(measure))
    return Plot(name, title, "layers skipped, share", label, panels, needs=needs)


def _skip_series(measure: str) -> Maker:
    """A line for each layout, law and correction, all from full depth on."""

    def make(entries: Sequence[PointRow]) -> list[Series]:
        lines: dict[str, list[PointRow]] = {}
        several = len({entry.point["correction"] for entry in entries} - {None}) > 1
        for entry in entries:
            if entry.point["law"] is not None:
                label = _label(entry, law=entry.point["pp"] > 1, correction=several)
                lines.setdefault(label, []).append(entry)
        found = []
        for label, members in lines.items():
            full = [e for e in entries if e.point["law"] is None and _same_layout(e, members[0])]
            series = _series(label, [*full, *members], measure)
            if len(series.xs) > 1:
                found.append(series)
        return found

    return make


def _series(label: str, entries: Sequence[PointRow], measure: str) -> Series:
    known = sorted(
        ((e.share_skipped, e.estimates[measure]) for e in entries if measure in e.estimates),
        key=lambda pair: pair[0],
    )
    return Series(label, [x for x, _ in known], [y for _, y in known])


def _label(entry: PointRow, *, law: bool, correction: bool) -> str:
    parts = [entry.layout]
    if law and entry.point["law"]:
        parts.append(str(entry.point["law"]))
    if correction and entry.point["correction"]:
        parts.append(str(entry.point["correction"]))
    return ", ".join(parts)


def _same_layout(one: PointRow, other: PointRow) -> bool:
    return all(one.point[n] == other.point[n] for n in ("tp", "pp", "dp", "variant"))


def _scaling(table: Sequence[PointRow], name: str, *, weak: bool) -> Plot:
    kind = "Weak" if weak else "Strong"
    what = "the same work for each GPU" if weak else "the same work"
    return Plot(
        name,
        f"{kind} scaling: {what}, the fastest layout of each number of GPUs",
        "GPUs (processes where there are none)",
        "tokens/s of the step a GPU, relative" if weak else "tokens/s of the step, relative",
        _panels(table, lambda entries: _scaling_series(entries, weak)),
        log_x=True,
        needs=f"finished runs of a size on two numbers of GPUs with {what}",
    )


def _scaling_series(entries: Sequence[PointRow], weak: bool) -> list[Series]:
    """A line for each policy: tokens a second over those of the fewest GPUs, by seed."""
    groups: dict[tuple[Any, ...], list[PointRow]] = {}
    for entry in entries:
        work = entry.rows[0]["most_tokens_per_step"] / (entry.gpus if weak else 1)
        key = (entry.rows[0]["num_skipped"], entry.point["correction"], work)
        groups.setdefault(key, []).append(entry)
    found = []
    for (_, correction, _), members in groups.items():
        speeds = [entry for entry in members if entry.mean("step_tokens_per_second")]
        fastest: dict[int, PointRow] = {}
        for entry in sorted(speeds, key=lambda e: -(e.mean("step_tokens_per_second") or 0)):
            fastest.setdefault(entry.gpus, entry)
        if len(fastest) < 2:
            continue
        least = fastest[min(fastest)]
        label = f"{least.point['skip_ratio']:.0%} skipped"
        several = len({e.point["correction"] for e in entries} - {None}) > 1
        if several and correction:
            label += f", {correction}"
        xs = sorted(fastest)
        found.append(Series(label, xs, [_relative(fastest[x], least, weak) for x in xs]))
    return found


def _relative(entry: PointRow, least: PointRow, weak: bool) -> Estimate:
    base = {row["point"]["seed"]: row for row in least.rows}
    ratios = [
        _speed(row, weak) / _speed(base[row["point"]["seed"]], weak)
        for row in entry.rows
        if row["point"]["seed"] in base
    ]
    return estimate(ratios) if ratios else Estimate(math.nan, None, 0)


def _speed(row: Mapping[str, Any], weak: bool) -> float:
    speed = row["generated_tokens"] / row["medians"]["timing_s/step"]
    return speed / row["gpus"] if weak else speed


def _against_kl(table: Sequence[PointRow]) -> Plot:
    """Final accuracy over the mean KL of the rollouts, a mark a point of the grid."""

    def make(entries: Sequence[PointRow]) -> list[Series]:
        found: dict[str, list[PointRow]] = {}
        for entry in entries:
            if {"kl", "accuracy_last"} <= entry.estimates.keys():
                label = entry.point["correction"] or "full depth"
                found.setdefault(str(label), []).append(entry)
        return [_kl_series(label, members) for label, members in found.items()]

    return Plot(
        "accuracy_off_policyness",
        "Accuracy at the end against off-policyness",
        "KL(behavior, target), nats per token, mean of all steps",
        "accuracy",
        _panels(table, make),
        needs="finished runs with evaluations",
    )


def _kl_series(label: str, entries: Sequence[PointRow]) -> Series:
    ordered = sorted(entries, key=lambda entry: entry.mean("kl") or 0.0)
    xs = [entry.estimates["kl"].mean for entry in ordered]
    return Series(label, xs, [entry.estimates["accuracy_last"] for entry in ordered])


def _over_time(table: Sequence[PointRow], name: str, key: str, label: str) -> Plot:
    """Accuracy after each evaluation, over what had been spent until then."""

    def make(entries: Sequence[PointRow]) -> list[Series]:
        names = _names(entries)
        series = (_time_series(e, key, name) for e, name in zip(entries, names, strict=True))
        return [one for one in series if len(one.xs) > 1]

    return Plot(
        name,
        f"Accuracy against {'wall time' if key == 'seconds' else 'GPU-hours'} of training",
        f"{label}, without evaluations and saves",
        "accuracy",
        _panels(table, make),
        needs="finished runs with two evaluations or more",
    )


def _names(entries: Sequence[PointRow]) -> list[str]:
    """Points by what is not the same in all of them."""
    several = len({entry.layout for entry in entries}) > 1
    laws = {entry.point["law"] for entry in entries} - {None}
    names = []
    for entry in entries:
        parts = [entry.layout] if several else []
        parts.append(f"{entry.share_skipped:.0%} skipped")
        parts += [entry.point["correction"]] if entry.point["correction"] else []
        parts += [entry.point["law"]] if len(laws) > 1 and entry.point["law"] else []
        names.append(", ".join(parts))
    return names


def _time_series(entry: PointRow, key: str, label: str) -> Series:
    by_step: dict[int, list[tuple[float, float]]] = {}
    for row in entry.rows:
        for evaluation in row["evaluations"]:
            value = accuracy(evaluation)
            if value is not None:
                by_step.setdefault(evaluation["step"], []).append((evaluation[key], value))
    pairs = [by_step[step] for step in sorted(by_step)]
    xs = [estimate([x for x, _ in found]).mean for found in pairs]
    return Series(label, xs, [estimate([y for _, y in found]) for found in pairs])
