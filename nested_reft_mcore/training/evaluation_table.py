"""Figures of an evaluation for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nested_reft_mcore.training.evaluation_figures import FULL, Estimate, Figures

_WIDTH = 160
"""Where the output is no terminal: rich would take 80 columns and fold every cell."""


def print_figures(figures: Sequence[Figures]) -> None:
    """One row a set, policy and label, with 95% intervals; accuracies are in percent."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    statistics = list(dict.fromkeys(name for one in figures for name in one.estimates))
    table = Table(box=SIMPLE, caption=_caption(figures), caption_justify="left", pad_edge=False)
    table.add_column("set")
    table.add_column("policy")
    table.add_column("prompts", justify="right")
    for name in statistics:
        table.add_column(heading(name), justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("cut off", justify="right")
    for place, one in enumerate(figures):
        if place and one.dataset != figures[place - 1].dataset:
            table.add_section()
        table.add_row(*_cells(one, statistics))
    console.print(table)
    changed = [one for one in figures if one.change and not one.part]
    if changed:
        console.print(_changes(changed))


def _caption(figures: Sequence[Figures]) -> str:
    measures = ", ".join(dict.fromkeys(one.measure for one in figures))
    unit = "percent" if measures == "reward" else f"{measures}, which is no accuracy,"
    return (
        f"{unit} [95% interval over prompts]; avg, maj and pass over the samples of a prompt; "
        "tokens and cut off: greedy, or of samples after a slash"
    )


def _changes(figures: Sequence[Figures]) -> Table:
    """What skipping costs, on the same prompts with the same random numbers."""
    statistics = list(dict.fromkeys(name for one in figures for name in one.change))
    unit = ", points" if figures[0].measure == "reward" else ""
    table = Table(
        box=SIMPLE,
        title=f"skipping minus full{unit} [95% interval, paired by prompt]",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("set")
    table.add_column("skipped")
    for name in statistics:
        table.add_column(heading(name), justify="right")
    for one in figures:
        cells = [_change(one, name) if name in one.change else "" for name in statistics]
        table.add_row(one.dataset, one.policy, *cells)
    return table


def heading(statistic: str) -> str:
    """The name of a statistic as papers have it."""
    name, _, rest = statistic.partition("@")
    number = rest.partition("/")[0]
    return {"mean": f"avg@{number}", "best": f"pass@{number}", "maj": f"maj@{number}"}.get(
        name, statistic
    )


def _cells(one: Figures, statistics: Sequence[str]) -> list[str]:
    policy = one.policy if one.policy == FULL else f"skip {one.policy}"
    return [
        f"  {one.part}" if one.part else one.dataset,
        policy,
        str(one.num_prompts),
        *(_value(one, name) if name in one.estimates else "" for name in statistics),
        "/".join(f"{value:.0f}" for value in one.response_length.values()),
        "/".join(f"{value:.1%}" for value in one.clip_ratio.values()),
    ]


def _value(one: Figures, statistic: str) -> str:
    return _interval(one.estimates[statistic], one.measure, "")


def _change(one: Figures, statistic: str) -> str:
    return _interval(one.change[statistic], one.measure, "+")


def _interval(estimate: Estimate, measure: str, sign: str) -> str:
    scale, form = (100, f"{sign}.1f") if measure == "reward" else (1, f"{sign}.3f")
    value, low, high = (
        format(scale * x, form) for x in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"
