"""The data of a page: plain values that JSON can hold, as small as they can be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nested_reft_mcore.report.intervals import Interval, accuracy_intervals, is_bound
from nested_reft_mcore.report.rollout_files import (
    RolloutEntry,
    RolloutIndex,
    failure_of,
    log_ratios,
    read_rollout,
)
from nested_reft_mcore.report.run_record import RunRecord
from nested_reft_mcore.report.selection import kept_counts
from nested_reft_mcore.report.tokens import token_lengths

MAX_STEPS = 4000
"""More steps than this are thinned out: no screen has as many columns."""
_SKIPPED_PART = re.compile(r"(\d+)(?:\.(attention|mlp))?")
_CELL = {None: 3, "attention": 1, "mlp": 2}
_ENVIRONMENT = ("time", "git", "python", "platform", "hostname", "cpu", "devices", "world_size")
_MAX_TEXT = 20_000
"""Characters of a prompt or completion that are shown."""


def run_data(run: RunRecord) -> dict[str, Any]:
    """What was run, and all of its metrics, as columns over its steps."""
    every = -(-len(run.steps) // MAX_STEPS) or 1
    keep = [
        place
        for place, step in enumerate(run.steps)
        if place % every == 0
        or place == len(run.steps) - 1
        or any(name.startswith("val-core/") for name in step)
    ]
    steps = [run.steps[place] for place in keep]
    intervals = accuracy_intervals(run)
    return {
        "name": run.name,
        "command": run.command,
        "notes": run.notes,
        "num_steps": run.num_steps,
        "config": flat(run.config),
        "environment": flat({k: run.environment[k] for k in _ENVIRONMENT if k in run.environment}),
        "versions": flat(run.environment.get("versions") or {}),
        "steps": [step["step"] for step in steps],
        "times": [_short(step.get("time"), 13) for step in steps],
        "thinned": [len(steps), len(run.steps)],
        "metrics": {
            name: [_short(step.get(name)) for step in steps]
            for name in run.metrics
            if not is_bound(name)
        },
        "intervals": {
            name: [_bounds(found[place]) for place in keep] for name, found in intervals.items()
        },
        "plans": _plans(run, [int(step["step"] or 0) for step in steps]),
    }


def rollouts_data(index: RolloutIndex, chosen: Sequence[RolloutEntry]) -> dict[str, Any]:
    """Chosen rollouts as columns, texts that repeat once, and how many there were."""
    prompts: dict[str, int] = {}
    plans: dict[str, int] = {}
    rows = [_rollout_row(entry, index.vocabulary, prompts, plans) for entry in chosen]
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    return {
        "counts": {k: list(v) for k, v in kept_counts(index.entries, chosen).items()},
        "num_bytes": index.num_bytes,
        "num_broken": index.num_broken,
        "has_vocabulary": index.vocabulary is not None,
        "prompts": list(prompts),
        "plans": list(plans),
        "columns": columns,
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted keys with values as text, in its own order."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = "null" if value is None else str(value)
    return found


def skipped_cells(plan: str, num_layers: int) -> str:
    """A digit for each layer: 0 it ran, 1 without attention, 2 without mlp, 3 it was skipped.

    Entries that cannot be read, and layers that are not there, are left out.
    """
    cells = [0] * num_layers
    for entry in plan.split(","):
        match = _SKIPPED_PART.fullmatch(entry.strip())
        if match and int(match[1]) < num_layers:
            cells[int(match[1])] |= _CELL[match[2]]
    return "".join(map(str, cells))


def _plans(run: RunRecord, steps: Sequence[int]) -> list[str | None] | None:
    """Cells of each step; None where the run has not recorded its plans."""
    depths = [step.get("nested/num_layers") for step in run.steps]
    num_layers = int(max((depth for depth in depths if depth), default=0))
    if not num_layers or not run.plans:
        return None
    return [skipped_cells(run.plans[s], num_layers) if s in run.plans else None for s in steps]


def _rollout_row(
    entry: RolloutEntry,
    vocabulary: Sequence[str] | None,
    prompts: dict[str, int],
    plans: dict[str, int],
) -> dict[str, Any]:
    line = read_rollout(entry)
    ratios, completion, prompt = log_ratios(line), line["completion"], line["prompt"]
    lengths = None
    if vocabulary and not entry.kind:
        lengths = token_lengths(completion, line["token_ids"], vocabulary)
    plan = line.get("plan")
    skipped = str(plan.get("skipped", "")) if isinstance(plan, dict) else ""
    return {
        "step": entry.step,
        "kind": entry.kind,
        "prompt": prompts.setdefault(_cut(prompt), len(prompts)),
        "prompt_index": entry.prompt_index,
        "sample": entry.sample_index,
        "completion": _cut(completion),
        "answer": None if line.get("answer") is None else str(line["answer"]),
        "reward": _short(entry.reward),
        "components": _components(line),
        "advantage": _short(line.get("advantage")),
        "failure": failure_of(line),
        "reason": line.get("judge_failure") or line.get("finish_reason"),
        "plan": plans.setdefault(skipped, len(plans)),
        "source": str(line.get("source", "")),
        "num_tokens": entry.num_tokens,
        "mean": round(entry.mean_log_ratio, 4),
        # Hundredths of a nat: a percent of the ratio.
        "ratios": None if ratios is None else [_hundredths(ratio) for ratio in ratios],
        "logprobs": [_hundredths(value) for value in line.get("behavior_logprobs") or []],
        "lengths": lengths,
    }


def _components(line: Mapping[str, Any]) -> dict[str, float | int | None] | None:
    """What each function of a weighted sum gave; None where the run has not recorded it."""
    found = line.get("components")
    if not isinstance(found, dict) or not found:
        return None
    return {str(name): _short(value) for name, value in found.items()}


def _cut(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]} [... {len(text) - _MAX_TEXT} more characters]"


def _hundredths(value: float | None) -> int | None:
    return round(100 * value) if value is not None and math.isfinite(value) else None


def _bounds(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [_short(bound) for bound in interval]


def _short(value: Any, digits: int = 6) -> float | int | None:
    """A number with so many digits; None for what is none, or not finite."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short
