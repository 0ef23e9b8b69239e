"""Run the study of corrections, see how far it is, collect its results.

    python examples/correction_study/study.py run --root runs/correction_study
    python examples/correction_study/study.py status --root runs/correction_study
    python examples/correction_study/study.py collect --root runs/correction_study

It may be stopped at any time and started again: finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from plan import Study, load_study, state_of
from results import RESULTS_DIRECTORY, collect
from runner import Runner

from nested_reft_mcore.config.errors import UserError

DESCRIPTION = "Run the study of corrections, see how far it is, collect its results."
STUDY_FILE = Path(__file__).with_name("study.yaml")


def main() -> int:
    """Do what the command line asks for. Returns 1 if a run is broken, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("action", choices=["run", "status", "collect"])
    parser.add_argument("--root", type=Path, default=Path("runs/correction_study"))
    parser.add_argument("--study", type=Path, default=STUDY_FILE)
    parser.add_argument("--grid", action="append", help="only this grid; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--minutes", type=float, help="start nothing after so long")
    parser.add_argument("--retry", action="store_true", help="also run what is broken")
    parser.add_argument("--results", type=Path, default=RESULTS_DIRECTORY)
    try:
        return follow(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def follow(arguments: argparse.Namespace) -> int:
    """Do the action. Returns 1 if a run is broken; raises UserError."""
    root = arguments.root.resolve()
    study = load_study(arguments.study, arguments.grid)
    if arguments.action == "status":
        return print_status(study, root)
    if arguments.action == "collect":
        for path, count in collect(study, root, arguments.results).items():
            say(f"{path}: {count} runs")
        return 0
    # As control-C does: the processes that it started end with it, and start anew next time.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    deadline = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
    runner = Runner(root, arguments.jobs, say, deadline)
    runner.run(study.runs, arguments.retry)
    return 1 if runner.broken else 0


def print_status(study: Study, root: Path) -> int:
    """Say how many runs are done, and name those that are not. Returns 1 if one is broken."""
    states = {run.name: state_of(run, root) for run in study.runs}
    for name, state in states.items():
        if state != "finished":
            print(f"{state:12} {name}")
    counts = Counter(states.values())
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["broken"] else 0


def say(text: str) -> None:
    """A line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
