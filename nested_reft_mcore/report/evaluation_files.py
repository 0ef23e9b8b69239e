"""Completions of evaluations, as the rollout browser shows them.

They are what `evaluate` and the training loop write: no token ids and no log-probs, so their texts
have no colours. Each belongs to a kind, such as `gsm8k, sampled, skip 3,5`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COMPLETIONS_FILE = "completions.jsonl"
FIGURES_FILE = "metrics.json"
_FILE = re.compile(r"step_(\d+)\.jsonl")


def is_evaluation(directory: Path) -> bool:
    """Whether `nested-reft evaluate` has written this directory."""
    return (directory / COMPLETIONS_FILE).is_file() and not (directory / "metrics.jsonl").exists()


def evaluation_files(directory: Path) -> list[tuple[Path, int]]:
    """Files of completions that a run or an evaluation holds, each with its step.

    Those of the training loop have the step of the metrics; those of `evaluate` that of the
    checkpoint, or 0 where weights have no step.
    """
    found = []
    for path in sorted((directory / "evaluation").glob("step_*.jsonl")):
        if match := _FILE.fullmatch(path.name):
            found.append((path, int(match[1])))
    for place in (directory, directory / "evaluate"):
        path = place / COMPLETIONS_FILE
        if path.is_file():
            found.append((path, evaluated_step(read_figures(place))))
    return found


def read_figures(directory: Path) -> dict[str, Any]:
    """What `evaluate` wrote beside the completions; empty where it cannot be read."""
    try:
        found = json.loads((directory / FIGURES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def evaluated_step(figures: Mapping[str, Any]) -> int:
    """The step of the weights; 0 where they have none."""
    value: Any = figures
    for key in ("settings", "weights", "step"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int) else 0


def as_rollout(line: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A line of an evaluation under the keys of a dumped rollout, with `kind`.

    Raises:
        KeyError: it lacks what every such line has.
    """
    policy = str(line["policy"])
    skipped = "" if policy == "full" else policy
    kind = ", ".join(_kind_of(str(line["dataset"]), str(line["mode"]), skipped))
    return {
        **line,
        # Dumped rollouts count steps from 0.
        "step": step - 1,
        "kind": kind,
        "prompt_index": line["row"],
        "sample_index": line["sample"],
        "token_ids": [],
        "plan": {"skipped": skipped},
    }


def _kind_of(dataset: str, mode: str, skipped: str) -> Iterator[str]:
    yield from (dataset, mode)
    if skipped:
        yield f"skip {skipped}"
