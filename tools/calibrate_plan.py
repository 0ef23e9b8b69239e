"""Fit the performance model of `nested-reft plan` to runs, and check it on runs it has not seen.

    nested-reft bench hardware --output mine.yaml
    python tools/calibrate_plan.py runs/a runs/b runs/c --hardware mine.yaml --output fitted.yaml
    nested-reft plan config.yaml --hardware fitted.yaml
    python tools/calibrate_plan.py runs/study --hardware mine.yaml --hold-out half --plot check.png

RUNS are run directories of `train`, or directories that have some inside. Each needs two steps or
more; the first is not counted. With --hold-out some points (runs that differ in their seed alone)
are not fitted but predicted: `half` is every second one, ordered by parameters, TP, PP, DP, layers
skipped and law; anything else is a pattern for their names, and may be repeated. The runs of one
calibration have to be of one kind of machine, with nothing else on it.

Leaves with 0, or 2 for a mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from nested_reft_mcore.bench.calibration_runs import (  # noqa: E402
    find_runs,
    simulated_seconds,
)
from nested_reft_mcore.config.errors import UserError, reason_of  # noqa: E402
from nested_reft_mcore.planning.calibration import calibrate  # noqa: E402
from nested_reft_mcore.planning.calibration_check import (  # noqa: E402
    Check,
    check,
    predicted_seconds,
)
from nested_reft_mcore.planning.calibration_points import (  # noqa: E402
    Point,
    points_of,
    split_by_name,
    split_half,
)
from nested_reft_mcore.planning.calibration_report import (  # noqa: E402
    calibration_table,
    check_record,
    check_tables,
    remarks_of,
)
from nested_reft_mcore.planning.hardware import HardwareProfile, load_hardware  # noqa: E402
from nested_reft_mcore.planning.hardware_file import profile_yaml  # noqa: E402


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS")
    parser.add_argument(
        "--hardware", required=True, help="profile to start from: a name, or what was measured"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="write the profile here")
    parser.add_argument("--hold-out", action="append", default=[], metavar="half|PATTERN")
    parser.add_argument("--simulate", action="store_true", help="check `simulate` as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the check here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw predicted and measured")
    return parser.parse_args(words)


def work(options: argparse.Namespace) -> None:
    """Fit, check, print and write. Raises UserError."""
    points = points_of(find_runs(options.runs))
    kept, held = split(points, options.hold_out)
    start = load_hardware(options.hardware)
    name = options.output.stem if options.output else "calibrated"
    made = calibrate([run for point in kept for run in point.runs], start, name)
    print(calibration_table(made), flush=True)
    if options.output is not None:
        heading = "Written by tools/calibrate_plan.py; for `plan` and `simulate --hardware`."
        write(options.output, profile_yaml(made.profile, remarks_of(made), heading))
    if not held:
        return
    checks = checks_of(kept, held, made.profile, options.simulate)
    for title, found in checks.items():
        print("\n" + check_tables(title, found), flush=True)
    if options.json is not None:
        record = {title: check_record(found) for title, found in checks.items()}
        write(options.json, json.dumps(record, indent=2) + "\n")
    if options.plot is not None:
        from nested_reft_mcore.bench.calibration_plot import plot_check

        plot_check(next(iter(checks.values())), options.plot)


def split(points: Sequence[Point], wanted: Sequence[str]) -> tuple[list[Point], list[Point]]:
    """What is fitted, and what is held out."""
    if not wanted:
        return list(points), []
    if list(wanted) == ["half"]:
        return split_half(points)
    return split_by_name(points, wanted)


def checks_of(
    kept: Sequence[Point], held: Sequence[Point], profile: HardwareProfile, simulated: bool
) -> dict[str, Check]:
    """The check of `plan`, and of `simulate` where that is wanted."""
    found = {"plan": check(held, kept, partial(predicted_seconds, profile))}
    if simulated:
        found["simulate"] = check(held, kept, partial(simulated_seconds, profile))
    return found


def write(path: Path, text: str) -> None:
    """Write a file. UserError where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason_of(error)}") from None
    print(f"{path}: written", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    try:
        work(arguments(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
