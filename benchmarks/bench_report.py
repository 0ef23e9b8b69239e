"""Size of a report, and how long a headless Chromium takes to open it.

By default of a run of 1,000 steps with 100 MB of rollouts, made for the purpose: the page has to be
below 10 MB and to be drawn, rollouts and all, in less than 3 seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from chromium import Chromium, find_chromium
from synthetic_run import write_run

from nested_reft_mcore.cli.reporting import run_report

LARGEST_MEGABYTES = 10.0
LONGEST_SECONDS = 3.0


def measure_opening(page: Path, browser: str) -> dict[str, float]:
    """Seconds from the start of loading until curves, and then everything, are drawn."""
    with Chromium(browser) as chromium:
        chromium.open(page)
        curves = chromium.wait_for("document.documentElement?.dataset.ready !== undefined")
        rest = chromium.wait_for("document.documentElement?.dataset.ready === 'all'")
        problems = chromium.problems()
    if problems:
        raise SystemExit(f"the page has complained: {problems}")
    return {"curves_seconds": round(curves, 2), "all_seconds": round(curves + rest, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--megabytes", type=float, default=100.0, help="rollouts")
    parser.add_argument("--rounds", type=int, default=3, help="times that the page is opened")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        run = Path(room) / "run"
        write_run(run, arguments.steps, int(1e6 * arguments.megabytes))
        started = time.monotonic()
        run_report([run], None, False, 9.0, True)
        made = time.monotonic() - started
        page = run / "report.html"
        figures = {
            "steps": arguments.steps,
            "rollout_megabytes": sum(p.stat().st_size for p in run.glob("rollouts/*")) / 1e6,
            "page_megabytes": page.stat().st_size / 1e6,
            "written_in_seconds": round(made, 1),
        }
        browser = find_chromium()
        if browser is None:
            print("no Chromium found: opening was not measured", file=sys.stderr)
        else:
            rounds = [measure_opening(page, browser) for _ in range(arguments.rounds)]
            figures["opened"] = sorted(rounds, key=lambda one: one["all_seconds"])  # type: ignore
    print(json.dumps(figures, indent=2))
    is_small = figures["page_megabytes"] < LARGEST_MEGABYTES
    opened = figures.get("opened")
    is_fast = not opened or opened[len(opened) // 2]["all_seconds"] < LONGEST_SECONDS  # type: ignore
    sys.exit(0 if is_small and is_fast else 1)


if __name__ == "__main__":
    main()
