"""95 % intervals of accuracies: the run's own, from its completions, or from the number of prompts.

Completions of one prompt are alike, so the prompt is the unit: with m prompts the interval is that
of the mean of m per-prompt means.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.report.run_record import RunRecord

ACCURACY = "val-core/"
"""Prefix of metrics that are accuracies."""
BOUNDS = (("/ci_low", "/ci_high"), ("/low", "/high"))
"""Endings of the metrics in which a run tells the bounds itself."""
_Z = 1.959964
"""Standard deviations that hold 95 % of a normal distribution."""

Interval = tuple[float, float]


def wilson(share: float, count: float) -> Interval:
    """Wilson's score interval of a share of `count` trials (Wilson 1927)."""
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def of_means(values: Sequence[float]) -> Interval:
    """Of the mean of independent values, from their own spread."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    half = _Z * math.sqrt(variance / count)
    return mean - half, mean + half


def is_bound(name: str) -> bool:
    """Whether the metric is a bound of another one, and no accuracy itself."""
    return name.startswith(ACCURACY) and name.endswith(tuple(e for pair in BOUNDS for e in pair))


def accuracy_intervals(run: RunRecord) -> dict[str, list[Interval | None]]:
    """For each accuracy of the run, an interval of each of `run.steps`, or None."""
    names = [n for n in run.metrics if n.startswith(ACCURACY) and not is_bound(n)]
    found: dict[str, list[Interval | None]] = {name: [] for name in names}
    for step in run.steps:
        sampled: dict[str, list[float]] | None = None
        for name in names:
            value = step.get(name)
            if value is None:
                found[name].append(None)
                continue
            interval = _own(step, name)
            if interval is None:
                if sampled is None:
                    sampled = _prompt_means(run.directory, int(step["step"] or 0))
                interval = _estimated(value, sampled.get(name.rpartition("/")[2]), step)
            found[name].append(interval)
    return found


def _own(step: dict[str, float | None], name: str) -> Interval | None:
    for low, high in BOUNDS:
        bounds = step.get(name + low), step.get(name + high)
        if bounds[0] is not None and bounds[1] is not None:
            return bounds[0], bounds[1]
    return None


def _estimated(
    value: float, means: list[float] | None, step: dict[str, float | None]
) -> Interval | None:
    is_share = 0 <= value <= 1
    # The file has to be that of this very evaluation.
    if means and math.isclose(math.fsum(means) / len(means), value, abs_tol=1e-4):
        if is_share and all(mean in (0.0, 1.0) for mean in means):
            return wilson(value, len(means))
        return of_means(means)
    count = step.get("val-aux/num_prompts")
    # Samples of a prompt beyond the first can only narrow it.
    return wilson(value, count) if is_share and count else None


def _prompt_means(directory: Path, step: int) -> dict[str, list[float]]:
    """For each mode (`greedy`, `mean@4`), the mean reward of every prompt; empty if unreadable."""
    path = directory / "evaluation" / f"step_{step:06d}.jsonl"
    rewards: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                row = json.loads(line)
                prompt = str(row.get("source") or row["prompt"])
                rewards[str(row["mode"])][prompt].append(float(row["reward"]))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {
        mode: [math.fsum(group) / len(group) for group in prompts.values()]
        for mode, prompts in rewards.items()
    }
