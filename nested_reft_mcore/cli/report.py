"""`nested-reft report`. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or those of `evaluate`."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Page to write; default: report.html in the run directory, or here for several.",
        ),
    ] = None,
    png: Annotated[
        bool,
        typer.Option("--png", help="Also draw the curves for papers, into a folder beside it."),
    ] = False,
    max_megabytes: Annotated[
        float, typer.Option(help="Largest page; rollouts are left out until it fits.")
    ] = 9.0,
    rollouts: Annotated[
        bool, typer.Option("--rollouts/--no-rollouts", help="Put rollouts into the page.")
    ] = True,
) -> None:
    """Write one HTML page that explains a run, or compares several.

    What was run, every metric as a curve (accuracies with 95 % intervals), where the time of a step
    goes, which layers each step skipped, and the rollouts: filtered by step, reward and text, their
    tokens coloured by importance ratio. The page needs no network and no server: send it, keep it,
    open it. A run may still be going on, be unfinished or damaged; the page says so.

    docs/report.md says how to read it.

    \b
    Examples:
      nested-reft report runs/first
      nested-reft report runs/nested runs/on_policy --output compare.html
      nested-reft report runs/* --no-rollouts --png
    """
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.reporting import run_report

    leave(lambda: run_report(runs, output, png, max_megabytes, rollouts))
