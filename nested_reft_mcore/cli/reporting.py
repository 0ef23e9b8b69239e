"""Write the page of `nested-reft report`, and its pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import rich.progress
from rich.console import Console

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.report.builder import Page, build_page
from nested_reft_mcore.report.run_record import RunRecord, read_runs

_LEAST_MEGABYTES = 0.2


def run_report(
    directories: Sequence[Path],
    output: Path | None,
    with_png: bool,
    max_megabytes: float,
    with_rollouts: bool,
) -> int:
    """Read, write, and say what was written; returns the exit code. Raises UserError."""
    if max_megabytes < _LEAST_MEGABYTES:
        raise UserError(
            f"--max-megabytes {max_megabytes:g}: expected at least {_LEAST_MEGABYTES:g}"
        )
    runs = read_runs(directories)
    if output is None:
        output = directories[0] / "report.html" if len(runs) == 1 else Path("report.html")
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory; expected the name of a file")
    page = _build(runs, int(max_megabytes * 1e6), with_rollouts)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".{output.name}.partial")
        aside.write_text(page.html, encoding="utf-8")
        aside.replace(output)
        pictures = _draw(runs, output) if with_png else []
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from error
    _say(runs, page, output, pictures)
    return ExitCode.OK


def _build(runs: Sequence[RunRecord], max_bytes: int, with_rollouts: bool) -> Page:
    """The page, with a bar on a terminal: a large run has gigabytes of rollouts to read."""
    console = Console(file=sys.stderr)
    with rich.progress.Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        tasks: dict[str, rich.progress.TaskID] = {}

        def told(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(f"rollouts of {name}", total=total)
            bar.update(tasks[name], completed=done)

        hear: Callable[[str, int, int], None] = told
        return build_page(runs, max_bytes, with_rollouts=with_rollouts, told=hear)


def _draw(runs: Sequence[RunRecord], output: Path) -> list[Path]:
    from nested_reft_mcore.report.figures import save_figures

    return save_figures(runs, output.with_suffix("").with_name(f"{output.stem}_png"))


def _say(runs: Sequence[RunRecord], page: Page, output: Path, pictures: Sequence[Path]) -> None:
    for run, counts in zip(runs, page.counts, strict=True):
        shown, there = counts.get("all", [0, 0])
        print(f"{run.name}: {len(run.steps)} recorded steps, {shown} of {there} rollouts shown")
        for note in run.notes:
            print(f"  {note}")
    print(f"{output}: {len(page.html.encode('utf-8')) / 1e6:.2f} MB; open it in a browser")
    if pictures:
        print(f"{pictures[0].parent}/: {', '.join(path.name for path in pictures)}")
