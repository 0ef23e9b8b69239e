"""What a run has completed, in training and evaluations: a light index, and single ones in full."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nested_reft_mcore.report.evaluation_files import as_rollout, evaluation_files

_FILE = re.compile(r"step_(\d+)\.dp\d+\.jsonl")
MAX_LOG_RATIO = 20.0
"""Nats; larger log ratios are shown as this."""


class RolloutEntry(NamedTuple):
    """What is kept in memory of each dumped rollout."""

    step: int
    """As metrics count: the step whose update learned from it, from 1."""
    prompt_index: int
    sample_index: int
    path: Path
    offset: int
    """Of its line in the file, bytes."""
    reward: float
    num_tokens: int
    num_characters: int
    """Of completion and prompt."""
    failure: str
    """`error`, `timeout`, `nan`, `truncated`, or empty."""
    mean_log_ratio: float
    """Nats per token, target over behavior; 0 where it is not known."""
    largest_log_ratio: float
    """Of one token, the one with the largest magnitude."""
    kind: str = ""
    """Empty in training; set, mode and skipped layers of an evaluation."""


@dataclass
class RolloutIndex:
    """All rollouts of a run."""

    entries: list[RolloutEntry] = field(default_factory=list)
    num_bytes: int = 0
    num_broken: int = 0
    """Lines that cannot be read."""
    vocabulary: list[str] | None = None
    """Text of each token id; None where the run has not written it."""


def index_rollouts(
    run_dir: Path, told: Callable[[int, int], None] = lambda done, total: None
) -> RolloutIndex:
    """Read every dumped rollout of the run once, and every completion of its evaluations.

    `told` hears how many bytes of how many are read. Lines that are no rollouts are counted.
    """
    index = RolloutIndex(vocabulary=_read_vocabulary(run_dir / "rollouts" / "vocabulary.json"))
    paths = sorted(p for p in (run_dir / "rollouts").glob("step_*.jsonl") if _FILE.match(p.name))
    files: list[tuple[Path, int | None]] = [(path, None) for path in paths]
    files += evaluation_files(run_dir)
    total = sum(path.stat().st_size for path, _ in files)
    for path, step in files:
        for offset, line in _lines(path):
            index.num_bytes += len(line)
            try:
                found = json.loads(line)
                row = found if step is None else as_rollout(found, step)
                index.entries.append(_entry(path, offset, row))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                index.num_broken += bool(line.strip())
        told(index.num_bytes, total)
    return index


def read_rollout(entry: RolloutEntry) -> dict[str, Any]:
    """The whole line, under the keys of a dumped rollout."""
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        line = json.loads(file.readline())
    return as_rollout(line, entry.step) if entry.kind else line


def log_ratios(line: dict[str, Any]) -> list[float | None] | None:
    """log(target / behavior) of each token, in nats; None where the run has not recorded it."""
    target, behavior = line.get("target_logprobs"), line.get("behavior_logprobs")
    if not isinstance(target, list) or not isinstance(behavior, list):
        return None
    if len(target) != len(behavior):
        return None
    return [
        None if one is None or other is None else _bounded(float(one) - float(other))
        for one, other in zip(target, behavior, strict=True)
    ]


def _bounded(value: float) -> float:
    return max(-MAX_LOG_RATIO, min(MAX_LOG_RATIO, value)) if math.isfinite(value) else 0.0


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _entry(path: Path, offset: int, line: dict[str, Any]) -> RolloutEntry:
    ratios = [ratio for ratio in log_ratios(line) or [] if ratio is not None]
    return RolloutEntry(
        step=int(line["step"]) + 1,
        prompt_index=int(line["prompt_index"]),
        sample_index=int(line["sample_index"]),
        path=path,
        offset=offset,
        reward=float(line["reward"]),
        num_tokens=len(line["token_ids"]) or int(line.get("num_tokens", 0)),
        num_characters=len(line["completion"]) + len(line["prompt"]),
        failure=failure_of(line),
        mean_log_ratio=math.fsum(ratios) / len(ratios) if ratios else 0.0,
        largest_log_ratio=max(ratios, key=abs, default=0.0),
        kind=line.get("kind", ""),
    )


def failure_of(line: dict[str, Any]) -> str:
    """What went wrong with a rollout; the gravest of it."""
    if line.get("judge_failure") is not None:
        return "timeout" if line["judge_failure"] == "timeout" else "error"
    return {"length": "truncated", "nan": "nan"}.get(line.get("finish_reason") or "", "")


def _read_vocabulary(path: Path) -> list[str] | None:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return texts if is_list else None
