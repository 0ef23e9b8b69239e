"""Seconds for a batch of completions of which half end, or hang, their reward worker.

The others are judged by math-verify through sympy, so that every worker has all of that imported.
The floor is what the deadlines alone take: half of the completions, shared by the workers, where
they hang, and nothing where they crash.

python benchmarks/bench_lost_workers.py [--completions 256] [--workers 2] [--deadline 0.5]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.math_verify import verify_by_library
from nested_reft_mcore.rewards.pool import RewardPool

PLENTY = 10.0
"""Seconds: the deadline where workers crash."""


def crashing_or_hanging(item: RewardItem) -> float:
    """What a worker calls."""
    if item.completion == "crash":
        os._exit(1)
    if item.completion == "hang":
        time.sleep(3600)
    return verify_by_library(item.completion, item.answer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--completions", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=0.5, help="seconds, where they hang")
    options = parser.parse_args()
    for kind, deadline in (("crash", PLENTY), ("hang", options.deadline)):
        print(json.dumps(measure(kind, options.completions, options.workers, deadline)))


def measure(kind: str, count: int, num_workers: int, deadline: float) -> dict[str, Any]:
    """One row of figures."""
    items = []
    for place in range(count // 2):
        fraction = rf"\frac{{{place}}}{{7}}"
        items += [RewardItem("", f"so ${fraction}$", fraction), RewardItem("", kind, fraction)]
    function = f"{Path(__file__).resolve()}:{crashing_or_hanging.__name__}"
    with RewardPool(function, num_workers, deadline) as pool:
        pool.scopes()
        start = time.monotonic()
        results = pool.score(items)
        seconds = time.monotonic() - start
        lost = sum(result.error is not None for result in results[::2])
        return {
            "kind": kind,
            "completions": len(items),
            "workers": num_workers,
            "seconds": round(seconds, 2),
            "floor": count // 2 * deadline / num_workers if kind == "hang" else 0.0,
            "errors": pool.errors,
            "timeouts": pool.timeouts,
            "innocent_lost": lost,
            "load": round(os.getloadavg()[0], 1),
        }


if __name__ == "__main__":
    main()
