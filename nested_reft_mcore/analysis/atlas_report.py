"""The atlas as tables in Markdown, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nested_reft_mcore.analysis.atlas import NUM_GROUPS, Atlas, Point

_PLOTTED_SAMPLES = 256


def atlas_record(atlas: Atlas) -> dict[str, Any]:
    """Everything as JSON-ready values."""
    settings = asdict(atlas.settings)
    return {
        "settings": settings,
        "distances": [asdict(distance) for distance in atlas.distances],
        "points": [asdict(point) for point in atlas.points],
    }


def atlas_tables(atlas: Atlas) -> str:
    """All tables, in Markdown that reads in a terminal too."""
    rows = atlas.select("estimator")
    parts = [
        ("How far off-policy", _distance_table(atlas)),
        (
            "Bias and cosine of the mean gradient; variance of one completion's",
            _estimator_table([p for p in rows if p.section != "sampling"], atlas),
        ),
        (
            "The same under other sampling",
            _estimator_table([p for p in rows if p.section == "sampling"], atlas),
        ),
        ("Least mean squared error", _best_table(atlas, "squared_error")),
        ("Least error up to scale", _best_table(atlas, "scaled_error")),
        (
            "Denominators: cosine of one completion's mean gradient; error up to scale of a batch",
            _denominator_table(atlas),
        ),
        (
            "Groups as batches of their own: bias and cosine, graded rewards",
            _group_table(atlas, "group"),
        ),
        (
            f"Batches of {NUM_GROUPS} groups: bias and cosine, graded rewards",
            _group_table(atlas, "batch"),
        ),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts) + "\n"


def save_figure(atlas: Atlas, path: Path) -> None:
    """Four panels over the layers skipped: bias, variance, error of a batch, and who errs least."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = min(atlas.settings.batch_sizes, key=lambda b: abs(b - _PLOTTED_SAMPLES))
    figure = Figure(figsize=(12.0, 9.0), layout="constrained")
    # Not through pyplot: no state of its process is touched, and no display is looked for.
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    rows = _by_name(p for p in atlas.select("estimator") if p.section == "correction")
    for index, (name, points) in enumerate(rows.items()):
        style = {"label": name, "color": f"C{index}", "marker": "os^vD"[index % 5], "markersize": 5}
        skipped = [point.num_skipped for point in points]
        # Rounding of an unbiased estimator is no bias to plot.
        biases = [point.bias if point.bias > 1e-6 else float("nan") for point in points]
        panels[0, 0].plot(skipped, biases, **style)
        panels[0, 1].semilogy(skipped, [point.variance for point in points], **style)
        panels[1, 0].semilogy(skipped, [point.squared_error[size] for point in points], **style)
    titles = (
        (panels[0, 0], "Bias", "|mean gradient - on-policy gradient|"),
        (panels[0, 1], "Variance of one completion's gradient", "trace of covariance"),
        (
            panels[1, 0],
            f"Mean squared error of a batch of {size}",
            "bias² + variance / batch",
        ),
    )
    for panel, title, label in titles:
        panel.set(title=title, ylabel=f"{label} (relative)")
    panels[0, 0].set_title("Bias (trajectory: exactly 0, and so are all with nothing skipped)")
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    for panel in panels.flat:
        panel.set_xlabel("layers skipped (KL to the target, nats a token)")
        panel.set_xticks(
            [d.num_skipped for d in atlas.distances],
            [f"{d.num_skipped}\n({d.kl:.2f})" for d in atlas.distances],
        )
    _draw_best(panels[1, 1], atlas)
    figure.savefig(path, dpi=110)


def best(atlas: Atlas, num_skipped: int, batch_size: int, error: str) -> Point:
    """The correction with the least `squared_error` or `scaled_error` of a batch."""
    points = [
        point
        for point in atlas.select("estimator")
        if point.section == "correction" and point.num_skipped == num_skipped
    ]
    return min(points, key=lambda point: getattr(point, error)[batch_size])


def _draw_best(panel: Any, atlas: Atlas) -> None:
    """Who errs least, as names in a grid of layers skipped and batch sizes."""
    depths = [d.num_skipped for d in atlas.distances if d.num_skipped]
    sizes = atlas.settings.batch_sizes
    for k in depths:
        for row, size in enumerate(sizes):
            names = (best(atlas, k, size, e).name for e in ("squared_error", "scaled_error"))
            panel.text(k, row, "\n".join(names), ha="center", va="center", fontsize=7.5)
    panel.set_yticks(range(len(sizes)), [str(size) for size in sizes])
    panel.set(
        xlim=(min(depths, default=0) - 0.6, max(depths, default=0) + 0.6),
        ylim=(-0.6, len(sizes) - 0.4),
        ylabel="completions in the batch",
        title="Least error: mean squared (above), up to scale (below)",
    )


def _distance_table(atlas: Atlas) -> str:
    rows = [
        (
            f"{d.num_skipped} of {atlas.settings.num_layers}",
            f"{d.kl:.3f}",
            f"{d.ess:.3f}",
            f"{d.ess_sequence:.3f}",
            f"{d.total_variation:.3f}",
        )
        for d in atlas.distances
    ]
    return _markdown(("skipped", "KL a token", "ESS, tokens", "ESS, completions", "TV"), rows)


def _estimator_table(shown: Sequence[Point], atlas: Atlas) -> str:
    rows, section = [], ""
    for name, points in _by_name(shown).items():
        if points[0].section != section:
            section = points[0].section
            rows.append((f"**{_SECTION_TITLES[section]}**", *[""] * len(points)))
        cells = [
            f"{_number(point.bias)} / {point.cosine:.3f} / {_number(point.variance)}"
            for point in points
        ]
        rows.append((name, *cells))
    return _markdown(("bias / cosine / variance", *_depths(atlas)), rows)


def _best_table(atlas: Atlas, error: str) -> str:
    rows = []
    for size in atlas.settings.batch_sizes:
        points = [best(atlas, d.num_skipped, size, error) for d in atlas.distances if d.num_skipped]
        rows.append((str(size), *(f"{p.name} {getattr(p, error)[size]:.3f}" for p in points)))
    titles = [title for title in _depths(atlas) if title != "0"]
    return _markdown(("completions", *titles), rows)


def _denominator_table(atlas: Atlas) -> str:
    sizes = atlas.settings.batch_sizes[0], atlas.settings.batch_sizes[-1]

    def cell(point: Point) -> str:
        exact = f"{_number(point.bias)} / {point.cosine:.3f} / {_number(point.variance)}"
        return exact + "".join(f" / {point.scaled_error[b]:.3f}" for b in sizes)

    rows = [
        (name, *(cell(point) for point in points))
        for name, points in _by_name(atlas.select("denominator"), with_section=True).items()
    ]
    return _markdown(
        (f"bias / cosine / variance / batch of {sizes[0]} / {sizes[1]}", *_depths(atlas)), rows
    )


def _group_table(atlas: Atlas, table: str) -> str:
    rows = [
        (name, *(f"{_number(p.bias)} / {p.cosine:.3f} / {_number(p.variance)}" for p in points))
        for name, points in _by_name(atlas.select(table), with_section=True).items()
    ]
    return _markdown(("bias / cosine / variance", *_depths(atlas)), rows)


def _depths(atlas: Atlas) -> list[str]:
    return [str(distance.num_skipped) for distance in atlas.distances]


def _by_name(points: Any, with_section: bool = False) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        name = f"{point.name}, {point.section}" if with_section else point.name
        found.setdefault(name, []).append(point)
    return found


def _number(value: float) -> str:
    if value < 1e-6:
        return "0"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


_SECTION_TITLES = {
    "correction": "corrections",
    "lambda": "traces with lambda below 1",
    "rejection": "rejections, on top of practical",
    "objective": "clipped ratios, bypass mode, first step",
    "sampling": "corrections, other sampling",
}
