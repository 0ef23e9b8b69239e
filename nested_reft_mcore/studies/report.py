"""The report of a study: table.csv, report.md, results.jsonl, and a PNG for each plot."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.config.errors import UserError, reason_of
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.studies.grid import Grid, StudyRun
from nested_reft_mcore.studies.plots import Plot, draw, plots_of
from nested_reft_mcore.studies.results import RESULTS_FILE, Row, row_of, write_rows
from nested_reft_mcore.studies.states import RunState, is_being_run, state_of, write_aside
from nested_reft_mcore.studies.table import PointRow, SeedSpread, csv_text, markdown, table_of

_SPREADS = {"tokens_per_second": "generated tokens/s", "step_seconds": "seconds of a step"}
TABLE_FILE = "table.csv"
REPORT_FILE = "report.md"


def write_report(grid: Grid, output: Path | None = None) -> list[str]:
    """Write everything about the runs that are finished; returns what was made and left out.

    `output`: left out, `report` in the study's output.

    Raises:
        UserError: no run is finished, or the directory cannot be written.
    """
    command = f"scaling_study.py report {_word(grid.path)}"
    if output is None:
        output = grid.output / "report"
    else:
        command += f" --output {_word(output)}"
    states = {run.name: state_of(run, being_run=is_being_run(grid.output)) for run in grid.runs}
    rows = [row for run in grid.runs if (row := _row(run, states[run.name])) is not None]
    if not rows:
        broken = [run for run in grid.runs if states[run.name].kind in ("broken", "stale")]
        told = [f"{run.name}: {states[run.name].describe(run.num_steps)}" for run in broken]
        text = f"{grid.path}: no run is finished, of {len(grid.runs)} in {grid.output}; "
        raise UserError("\n".join([text + "`status` tells where they stand", *told]))
    table = table_of(rows)
    plots = plots_of(table)
    write_rows(output / RESULTS_FILE, rows)
    write_aside(output / TABLE_FILE, csv_text(table))
    made = []
    for plot in plots:
        path = output / f"{plot.name}.png"
        if plot.is_empty:
            path.unlink(missing_ok=True)
            continue
        try:
            made.append(draw(plot, output))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {reason_of(error)}") from None
    text = _markdown(grid, rows, table, plots, states, command)
    write_aside(output / REPORT_FILE, text)
    files = [output / name for name in (REPORT_FILE, TABLE_FILE, RESULTS_FILE)]
    return [
        *(str(path) for path in (*files, *made)),
        *(f"left out: {_why_left_out(plot)}" for plot in plots if plot.is_empty),
        *(f"left out: {told}" for told in _unfinished(grid, states)),
        *noise_lines(table),
        f"{len(rows)} of {len(grid.runs)} runs are finished",
    ]


def _row(run: StudyRun, state: RunState) -> Row | None:
    if state.kind != "finished":
        return None
    point = run.point
    layout = Layout.of(run.architecture, run.config.parallel, 1, point.world_size)
    return row_of(run, layout.model_parameters)


def _why_left_out(plot: Plot) -> str:
    return f"{plot.name}.png: there are no {plot.needs}"


def _markdown(
    grid: Grid,
    rows: Sequence[Row],
    table: Sequence[PointRow],
    plots: Sequence[Plot],
    states: dict[str, RunState],
    command: str,
) -> str:
    origin = _origin(grid, rows, command)
    lines = [f"# {grid.study.name}", "", *origin, "", markdown(table), "", *_meaning(rows), ""]
    for line in noise_lines(table):
        lines += [line, ""]
    for plot in plots:
        if not plot.is_empty:
            lines += [f"## {plot.title}", "", f"![{plot.title}]({plot.name}.png)", ""]
    left_out = [f"- {_why_left_out(plot)}" for plot in plots if plot.is_empty]
    left_out += [f"- {told}" for told in _unfinished(grid, states)]
    if left_out:
        lines += ["## Left out", "", *left_out, ""]
    return "\n".join(lines)


def _origin(grid: Grid, rows: Sequence[Row], command: str) -> list[str]:
    """Machines, commits and dates of the runs, each kind once."""
    machines = Counter(_machine(row) for row in rows)
    commits = Counter(
        f"{(row['commit'] or 'unknown')[:12]}{' with changes' if row['changed'] else ''}"
        for row in rows
    )
    dates = sorted(str(row["date"])[:10] for row in rows)
    equal = f"Runs of a size have equal {grid.study.equal}."
    timed = sorted({row["timed_steps"] for row in rows})
    return [
        f"{len(rows)} of {len(grid.runs)} runs of `{grid.path.name}`. {equal} Made by "
        f"`python tools/{command}`.",
        "",
        *(f"- Machine: {name}" + _times(machines, number) for name, number in machines.items()),
        *(f"- Commit: {name}" + _times(commits, number) for name, number in commits.items()),
        f"- Date: {dates[0]}" + (f" to {dates[-1]}" if dates[-1] != dates[0] else ""),
        f"- Timed steps of a run, the first one left out: {', '.join(map(str, timed))}",
        *_whole(rows),
    ]


def _whole(rows: Sequence[Row]) -> list[str]:
    """What all runs took, where all have been timed from outside."""
    seconds = [row["seconds"] for row in rows]
    if None in seconds:
        return []
    return [f"- All runs one after the other, starts and saves included: {sum(seconds):,.0f} s"]


def _word(path: Path) -> str:
    """A path of the command that made the report, to be pasted: as given, or from here on."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _times(counter: Counter[str], number: int) -> str:
    return f" ({number} runs)" if len(counter) > 1 else ""


def _machine(row: Row) -> str:
    machine = row["machine"]
    devices = Counter(machine["devices"])
    told = [f"{number} x {name}" for name, number in devices.items()]
    told.append(f"{machine['cores']} cores of {machine['processor']}")
    told.append(f"{machine['memory_gib']:g} GiB" if machine["memory_gib"] else "memory unknown")
    if not devices:
        kernels = machine["decode_kernels"]
        told.append("native decoding kernels" if kernels == "native" else "no decoding kernels")
    return ", ".join(told)


def _meaning(rows: Sequence[Row]) -> list[str]:
    seeds = len({row["point"]["seed"] for row in rows})
    spread = (
        "± is half of a 95% interval over seeds (Student's t), of two seeds half their distance; "
        "nothing stands where there is one. In plots bars that leave a panel are cut."
        if seeds > 1
        else "One seed: no intervals."
    )
    sampled = any(e["sampled"] is not None for row in rows for e in row["evaluations"])
    lines = [
        "Times are medians over a run's steps. Speed-ups are ratios of generated tokens a second "
        "to the full-depth run of the same size, layout and seed; where completions end by "
        "themselves, runs of one size may write different numbers of tokens: look at the seconds "
        f"too. {spread}",
    ]
    if any(row["evaluations"] for row in rows):
        kind = "sampled" if sampled else "greedy"
        lines += [
            "",
            f"Accuracy is that of the full policy, {kind} completions, the mean over the sets.",
        ]
    return lines


def noise_lines(table: Sequence[PointRow]) -> list[str]:
    """How far the seeds of a point lie apart; nothing where each has one."""
    lines = []
    for measure, name in _SPREADS.items():
        spread = SeedSpread.of(table, measure)
        if spread is not None:
            which = "The two seeds" if spread.most_seeds == 2 else "The seeds"
            lines.append(
                f"{which} of a point differ in {name} by {spread.median:.1%} (median of "
                f"{spread.num_points} points; {spread.largest:.1%} at most)."
            )
    return lines


def _unfinished(grid: Grid, states: dict[str, RunState]) -> list[str]:
    steps = {run.name: run.num_steps for run in grid.runs}
    found = [
        f"{name}: {state.describe(steps[name])}"
        for name, state in states.items()
        if state.kind not in ("finished", "missing")
    ]
    missing = sum(state.kind == "missing" for state in states.values())
    if missing:
        found.append(f"{missing} runs are not started")
    return found + [f"{name}: does not fit: {reason}" for name, reason in grid.struck]
