"""Collect the runs of a sweep in one table, `results.csv` in their directory.

    python tools/collect_sweep.py runs/sweep_123

A row for each run that has recorded a step, finished or not. Rewards, tokens/s and off-policyness
are means over the last ten steps.
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.observability.tracking import read_metrics
from nested_reft_mcore.studies.results import greedy_accuracy

RESULTS_FILE = "results.csv"
LAST_STEPS = 10
MEANS = {
    "reward": "critic/rewards/mean",
    "response_length": "response_length/mean",
    "kl": "rollout_corr/kl",
    "ess": "nested/ess",
    "tokens_per_second": "perf/generated_tokens_per_second",
    "seconds_per_step": "timing_s/step",
}


def row_of(run_dir: Path) -> dict[str, Any] | None:
    """One run in one row; None if it has recorded no step. UserError if its files are broken."""
    lines = read_metrics(run_dir)
    steps = [line for line in lines if MEANS["reward"] in line]
    if not steps:
        return None
    config = load_config(run_dir / "config.yaml", ())
    greedy = [found for line in lines if (found := greedy_accuracy(line)) is not None]
    last = steps[-LAST_STEPS:]
    return {
        "run": run_dir.name,
        "skip_ratio": config.nested.skip_ratio,
        "correction": config.algorithm.rollout_is,
        "seed": config.seed,
        "steps": steps[-1]["step"],
        "of": config.train.num_steps,
        "greedy_first": greedy[0] if greedy else "",
        "greedy_last": greedy[-1] if greedy else "",
        **{
            name: statistics.fmean(found) if (found := [s[key] for s in last if key in s]) else ""
            for name, key in MEANS.items()
        },
    }


def collect(directory: Path) -> list[dict[str, Any]]:
    """Write the table of all runs in a directory; returns its rows."""
    found = [row_of(path.parent) for path in sorted(directory.glob("*/metrics.jsonl"))]
    rows = [row for row in found if row is not None]
    if rows:
        aside = directory / f".{RESULTS_FILE}"
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        aside.replace(directory / RESULTS_FILE)
    return rows


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("expected one directory: python tools/collect_sweep.py runs/sweep_123")
    directory = Path(sys.argv[1])
    try:
        rows = collect(directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{directory / RESULTS_FILE}: {len(rows)} runs")


if __name__ == "__main__":
    main()
