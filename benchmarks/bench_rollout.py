"""How fast rollouts are: every figure that the project wants, against what it wants.

Rows are measured one after the other; within a row everything takes turns, and medians count. A row
that needs something that was not given is skipped with a reason. SmolLM2-135M is 135 million
parameters as a Hugging Face directory, vLLM an interpreter of its own environment.

python benchmarks/bench_rollout.py [--hf DIR] [--vllm-python PATH] [--rows small lengths ...]
    [--threads 2] [--repeats 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollout_rows import ROWS, Line, Settings

from nested_reft_mcore.bench.report import align
from nested_reft_mcore.observability.environment import environment_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", metavar="DIR", help="SmolLM2-135M as a Hugging Face directory")
    parser.add_argument(
        "--vllm-python", metavar="PATH", help="interpreter of an environment that has vLLM"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"what to measure: {', '.join(ROWS)}; default: everything",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="of all processes together (default: 2)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a row (default: 5)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench_rollout.json"),
        help="JSON, written after every row (default: bench_rollout.json)",
    )
    options = parser.parse_args()
    settings = Settings(options.hf, options.vllm_python, options.threads, options.repeats)
    lines: list[Line] = []
    seconds: dict[str, float] = {}
    for name in options.rows:
        print(f"-- {name}", flush=True)
        started = time.perf_counter()
        lines += ROWS[name](settings)
        seconds[name] = time.perf_counter() - started
        report: dict[str, Any] = {
            "what": "bench_rollout",
            "environment": environment_report(),
            "settings": asdict(settings),
            "row_seconds": seconds,
            "lines": [{**asdict(line), "verdict": line.verdict} for line in lines],
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    show(lines)
    print(f"{options.output}: written")


def show(lines: list[Line]) -> None:
    """The table."""
    cells = [("what", "against", "measured", "at least", "aim", "verdict", "note")]
    for line in lines:
        wanted = f"<= {line.at_most:g}" if line.at_most is not None else number(line.at_least)
        cells.append(
            (
                line.what,
                line.against,
                number(line.measured),
                wanted,
                number(line.aim),
                line.verdict,
                line.note,
            )
        )
    print("\n".join(align(cells)))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
