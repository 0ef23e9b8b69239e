"""Verifications per second of answers like GSM8K's, against math-verify alone.

Every row judges the same completions in the same kind of pool, so messages and processes cost all
of them the same; the peer is math-verify called as its documentation says, two `parse`, a `verify`.
Rounds of the rows alternate. Completions are made up: worked arithmetic of about a hundred tokens
that ends in `#### N`, in a box or in "The answer is N.", eight to a question, half of them wrong.
With --data the completions say what the questions' own solutions say, before the answer.

python benchmarks/bench_rewards.py [--workers 2] [--rounds 5] [--data FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import math_verify
import psutil

from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.math_verify import expected_part
from nested_reft_mcore.rewards.pool import RewardPool

REPOSITORY = Path(__file__).resolve().parents[1]
PEER = f"{Path(__file__).resolve()}:library_alone"
ROWS = {
    "math-verify alone": PEER,
    "math_verify": "math_verify",
    "numeric_match": "numeric_match",
}
GROUP_SIZE = 8
ENDINGS = ("#### {}", "Thus the total is $\\boxed{{{}}}$.", "The answer is {}.")


def library_alone(item: RewardItem) -> float:
    """What a worker of the peer's row calls."""
    expected = math_verify.parse(f"\\boxed{{{expected_part(item.answer)}}}", parsing_timeout=0)
    found = math_verify.parse(item.completion, parsing_timeout=0)
    return float(math_verify.verify(expected, found, timeout_seconds=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=256, help="eight completions each")
    parser.add_argument("--data", type=Path, help="GSM8K's JSON lines")
    parser.add_argument("--output", type=Path, default=Path("bench_rewards.json"))
    options = parser.parse_args()
    items = make_items(options.questions, options.data)
    measured = measure(items, options.workers, options.rounds)
    report = {
        "what": "bench_rewards",
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("math-verify", "sympy")},
        "workers": options.workers,
        "completions": len(items),
        "mean_characters": statistics.mean(len(item.completion) for item in items),
        "data": options.data.name if options.data else "made up",
        "rows": measured,
    }
    show(report)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{options.output}: written")


def make_items(num_questions: int, data: Path | None) -> list[RewardItem]:
    """Completions in groups; the same for the same arguments."""
    draw = random.Random(0)
    lines = data.read_text(encoding="utf-8").splitlines() if data else []
    items = []
    for group in range(num_questions):
        if lines:
            worked = json.loads(lines[group % len(lines)])["answer"]
            body, answer = worked.rpartition("####")[0], expected_part(worked)
        else:
            body, answer = arithmetic(draw)
        for sample in range(GROUP_SIZE):
            number = int(answer.replace(",", "").partition(".")[0])
            said = answer if sample % 2 == 0 else str(number + draw.randint(1, 9))
            text = body + ENDINGS[sample % len(ENDINGS)].format(said)
            items.append(RewardItem("", text, answer, group=group))
    return items


def arithmetic(draw: random.Random) -> tuple[str, str]:
    """A worked answer of a few lines, and its result."""
    total, lines = draw.randint(2, 60), []
    for step in range(draw.randint(3, 6)):
        more = draw.randint(2, 90)
        lines.append(f"On day {step + 1} she sells {more} more, so she has {total} + {more} = ")
        total += more
        lines[-1] += f"${total} in her box now, which is what she needs for the next day.\n"
    return "".join(lines), f"{total:,}" if draw.random() < 0.3 else str(total)


def measure(items: list[RewardItem], workers: int, rounds: int) -> dict[str, Any]:
    """Median and spread per second of wall clock, and per second of all processes' CPU."""
    wall: dict[str, list[float]] = {name: [] for name in ROWS}
    cpu: dict[str, list[float]] = {name: [] for name in ROWS}
    verdicts: dict[str, list[float]] = {}
    pools = {name: RewardPool(reward, workers, 60.0) for name, reward in ROWS.items()}
    try:
        for name, pool in pools.items():
            verdicts[name] = [result.value for result in pool.score(items)]
        for _ in range(rounds):
            for name, pool in pools.items():
                spent, start = cpu_seconds(pool), time.perf_counter()
                pool.score(items)
                wall[name].append(len(items) / (time.perf_counter() - start))
                cpu[name].append(len(items) / (cpu_seconds(pool) - spent))
    finally:
        for pool in pools.values():
            pool.close()
    peer = verdicts["math-verify alone"]
    return {
        name: {
            "per_second": statistics.median(wall[name]),
            "spread": [min(wall[name]), max(wall[name])],
            "per_cpu_second": statistics.median(cpu[name]),
            "verdicts_like_the_peer": sum(
                a == b for a, b in zip(verdicts[name], peer, strict=True)
            ),
        }
        for name in ROWS
    }


def cpu_seconds(pool: RewardPool) -> float:
    """Of the workers and this process so far."""
    processes = [psutil.Process(pid) for pid in pool.worker_pids] + [psutil.Process()]
    return sum(t.user + t.system for t in (process.cpu_times() for process in processes))


def show(report: dict[str, Any]) -> None:
    count = report["completions"]
    print(f"{count} completions, {report['workers']} workers, load {report['load']:.1f}")
    print(f"{'reward':20} {'per second':>11} {'spread':>15} {'per CPU second':>15} {'as peer':>9}")
    for name, row in report["rows"].items():
        low, high = row["spread"]
        print(
            f"{name:20} {row['per_second']:11.0f} {low:7.0f}-{high:<7.0f} "
            f"{row['per_cpu_second']:15.0f} {row['verdicts_like_the_peer']:9}"
        )


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
