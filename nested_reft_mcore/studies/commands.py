"""`tools/scaling_study.py`: plan, run, submit, status and report of a study file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.config.errors import UserError, reason_of
from nested_reft_mcore.studies.grid import Grid, StudyRun, make_grid
from nested_reft_mcore.studies.prediction import Cluster, cluster_of, predict
from nested_reft_mcore.studies.schema import load_study

EPILOG = """
STUDY.yaml names a base configuration and the grid over it; docs/scaling_studies.md has an example
and every key. Exit codes: 0 well; 1 a run is broken or stale, or nothing fits; 2 a mistake in what
was given; 75 stopped on request: the same command goes on.
"""
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    parsed = make_parser().parse_args(arguments)
    try:
        code = parsed.work(parsed)
    except UserError as error:
        print(f"error: {error}".replace("\n", "\n  "), file=sys.stderr)
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        sys.exit(1)
    sys.exit(code)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scaling_study.py",
        description="Scaling studies: a grid of runs over one configuration.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(required=True, metavar="plan|run|submit|status|report")
    _add_plan(commands)
    _add_run(commands)
    _add_submit(commands)
    _add_status(commands)
    _add_report(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, short: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=short, description=text)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="the study file")
    return parser


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "plan",
        "what there is to run, what it takes, and what cannot fit",
        "List the runs with predicted memory, time and GPU-hours, and strike those that cannot "
        "fit. Nothing is started and no weights are read; times are those of `nested-reft plan`, "
        "without starts, evaluations and saves.",
    )
    _add_machines(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    parser.set_defaults(work=_plan)


def _add_run(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "run",
        "run it here, one run after the other",
        "Run the study here, one run after the other. A finished run is never repeated; one that "
        "was stopped goes on from its checkpoint; one that is broken (it failed, or its metrics "
        "cannot be read), or stale (its options have changed), is named and left alone. Ctrl-C "
        "saves the run that goes on and leaves with 75.",
    )
    _add_choice(parser)
    parser.add_argument("--limit", type=_positive, metavar="N", help="start N runs at most")
    parser.add_argument(
        "--retry",
        action="store_true",
        help="run broken ones again; stale ones, and those whose metrics cannot be read, anew: "
        "what they have written is set aside",
    )
    parser.set_defaults(work=_run)


def _add_submit(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "submit",
        "run it as a Slurm job array",
        "Submit what is not finished and fits as a Slurm job array, through slurm/sweep.sh. The "
        "runs are written to a file in the study's output first, so that editing the study later "
        "changes nothing of what was submitted. Runs of another number of nodes are an array of "
        "their own.",
    )
    _add_choice(parser)
    _add_machines(parser)
    parser.add_argument(
        "--max-running", type=_positive, default=4, metavar="N", help="tasks at a time; default: 4"
    )
    parser.add_argument("--retry", action="store_true", help="also what is broken or stale")
    parser.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, as --sbatch=--time=12:00:00; may be repeated",
    )
    parser.set_defaults(work=_submit)


def _add_status(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "status",
        "where each run stands",
        "Say where each run stands: finished, running at step i of n, queued, broken (with its "
        "log), stale, stopped, not started, or does not fit. Reads the run directories, and squeue "
        "and sacct where the study was submitted.",
    )
    _add_machines(parser)
    parser.set_defaults(work=_status)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "report",
        "one table, CSV and Markdown, and plots",
        "Write one table (table.csv, report.md), results.jsonl with a line a finished run, and "
        "plots (PNG), error bars over seeds. Works on a study that is half finished; plots that "
        "have no data, and runs that are broken or stale, are left out and named.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: report/ in the study's output",
    )
    parser.set_defaults(work=_report)


def _add_machines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machines, instead of the study's `cluster`")
    group.add_argument("--nodes", type=_positive, metavar="N", help="machines of a run at most")
    group.add_argument("--gpus-per-node", type=_positive, metavar="G", help="GPUs of each")
    group.add_argument("--gpu-memory", type=float, metavar="GB", help="of each, in 10^9 bytes")
    group.add_argument("--hardware", metavar="NAME|FILE", help="profile, as of `nested-reft plan`")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="runs whose name contains this; may be repeated, then any of them",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def _grid(arguments: argparse.Namespace) -> Grid:
    return make_grid(load_study(arguments.study), arguments.study)


def _cluster(arguments: argparse.Namespace, grid: Grid) -> Cluster:
    return cluster_of(
        grid.study.cluster,
        grid.path,
        arguments.nodes,
        arguments.gpus_per_node,
        arguments.gpu_memory,
        arguments.hardware,
    )


def chosen(grid: Grid, only: Sequence[str] | None) -> tuple[StudyRun, ...]:
    """Runs whose name contains one of the texts; all where there are none.

    Raises:
        UserError: no run's name does.
    """
    found = tuple(run for run in grid.runs if not only or any(text in run.name for text in only))
    if not found:
        raise UserError(
            f"--only {' '.join(only or ())}: no run is called so; names are as {grid.runs[0].name}"
        )
    return found


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from nested_reft_mcore.studies.plan_table import plan_record, plan_text

    grid = _grid(arguments)
    cluster = _cluster(arguments, grid)
    predictions = predict(grid.runs, cluster)
    print(plan_text(grid, predictions, cluster))
    if arguments.json is not None:
        record = json.dumps(plan_record(grid, predictions, cluster), indent=1)
        try:
            arguments.json.write_text(record + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json {arguments.json}: cannot be written: {reason_of(error)}"
            ) from None
    return 0 if any(prediction.fits for prediction in predictions.values()) else 1


def _run(arguments: argparse.Namespace) -> int:
    from nested_reft_mcore.studies.queue import queue_states
    from nested_reft_mcore.studies.runner import COME_BACK, Runner

    grid = _grid(arguments)
    runs = chosen(grid, arguments.only)
    missing = sorted({run.missing for run in runs if run.missing})
    if missing:
        raise UserError(f"{arguments.study}: not found: {', '.join(missing)}; get the models first")

    def say(text: str) -> None:
        print(text, flush=True)

    queued = {name for name, task in queue_states(grid.output).items() if task.is_active}
    for run in runs:
        if run.name in queued:
            say(f"queued   {run.name}: left to Slurm")
    runs = tuple(run for run in runs if run.name not in queued)
    sitting = Runner(grid, say).run(runs, retry=arguments.retry, limit=arguments.limit)
    say(
        f"{len(sitting.finished)} of {len(runs)} finished, {len(sitting.broken)} broken, "
        f"{len(sitting.stale)} stale"
    )
    if sitting.interrupted:
        return COME_BACK
    return 1 if sitting.broken or sitting.stale else 0


def _status(arguments: argparse.Namespace) -> int:
    from nested_reft_mcore.studies.status import status_of, status_text

    grid = _grid(arguments)
    predictions = predict(grid.runs, _cluster(arguments, grid))
    states = status_of(grid, predictions)
    print(status_text(grid, states))
    return 1 if any(state.kind in ("broken", "stale") for state in states.values()) else 0


def _submit(arguments: argparse.Namespace) -> int:
    from nested_reft_mcore.studies.submission import submit

    grid = _grid(arguments)
    cluster = _cluster(arguments, grid)
    return submit(
        grid,
        chosen(grid, arguments.only),
        predict(grid.runs, cluster),
        cluster,
        max_running=arguments.max_running,
        retry=arguments.retry,
        dry_run=arguments.dry_run,
        options=arguments.sbatch,
    )


def _report(arguments: argparse.Namespace) -> int:
    from nested_reft_mcore.studies.report import write_report

    grid = _grid(arguments)
    for line in write_report(grid, arguments.output):
        print(line)
    return 0
