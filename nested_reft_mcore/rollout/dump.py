"""Rollouts on disk, one JSON object per line: to read, and to repeat updates without generating.

A step's rollouts lie in `rollouts/step_000012.dp0.jsonl` below the run directory, one file for each
data-parallel replica. Every line stands alone. Log-probabilities are written with the digits that
tell float32 numbers apart, and reading gives the same bits back.

What the update made of a rollout stands in its line too, for people and `nested-reft report`; it is
not read back. `rollouts/vocabulary.json` has the text of every token id, so that a reader can cut a
completion into tokens without the tokenizer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutBatch, RolloutStats

_FOLDER = "rollouts"
_VOCABULARY_FILE = "vocabulary.json"
_TARGET_DIGITS = 4
"""Decimals of a target log-prob: 1e-4 nats is a hundredth of a percent of the ratio."""


@dataclass(frozen=True)
class Lesson:
    """What an update made of one rollout."""

    advantage: float
    target_logprobs: Sequence[float] | None = None
    """Nats, one per response token, of the full-depth policy right before the update that learned
    from the rollout, at the sampling temperature; None where the rollout was masked."""
    judge_failure: str | None = None
    """Why it could not be judged: `timeout`, or the error's text."""
    components: Mapping[str, float] | None = None
    """What each function of the reward's sum gave, without its weight; None where there is one."""


@dataclass(frozen=True)
class _Record:
    """One line."""

    rollout: Rollout
    reward: float
    plan: LayerSkipPlan


def rollout_file(run_dir: Path, step: int, replica: int) -> Path:
    """Where a replica's rollouts of a step are kept."""
    return run_dir / _FOLDER / f"step_{step:06d}.dp{replica}.jsonl"


def dump_rollouts(
    run_dir: Path,
    step: int,
    replica: int,
    batch: RolloutBatch,
    rewards: Sequence[float],
    lessons: Sequence[Lesson] | None = None,
) -> Path:
    """Write a replica's rollouts and their rewards; the file appears whole or not at all.

    Returns its path. Raises ValueError unless there is one reward, and one lesson if there are any,
    for each rollout.
    """
    if len(rewards) != len(batch.rollouts):
        raise ValueError(f"{len(batch.rollouts)} rollouts but {len(rewards)} rewards")
    if lessons is not None and len(lessons) != len(batch.rollouts):
        raise ValueError(f"{len(batch.rollouts)} rollouts but {len(lessons)} lessons")
    path = rollout_file(run_dir, step, replica)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".jsonl.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for place, (rollout, reward) in enumerate(zip(batch.rollouts, rewards, strict=True)):
            line = _to_json(step, rollout, float(reward), batch.plan)
            if lessons is not None:
                line |= _lesson_to_json(lessons[place])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return path


def dump_vocabulary(run_dir: Path, vocab_size: int, decode: Callable[[list[int]], str]) -> Path:
    """Write the text of each token id by itself, a JSON list; does nothing where it is there.

    `decode` gives the text of token ids. Returns the path; the file appears whole or not at all.
    """
    path = run_dir / _FOLDER / _VOCABULARY_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".json.tmp")
        texts = [decode([token_id]) for token_id in range(vocab_size)]
        # Escaped: a tokenizer may hold halves of characters, which no file in UTF-8 can.
        unfinished.write_text(json.dumps(texts), encoding="utf-8")
        unfinished.replace(path)
    return path


def load_rollouts(
    run_dir: Path, step: int, prompt_indices: range | None = None
) -> tuple[RolloutBatch, tuple[float, ...]]:
    """Read a step's rollouts and rewards, of all replicas or of the prompts in `prompt_indices`.

    The number of replicas that wrote them doesn't matter: rollouts come in the order of the global
    batch. Time and executions are not recorded, so those statistics are zero. Raises UserError for
    missing files, unreadable lines, missing prompts and incomplete groups.
    """
    pattern = rollout_file(run_dir, step, 0).name.replace("dp0", "dp*")
    paths = sorted((run_dir / _FOLDER).glob(pattern))
    if not paths:
        raise UserError(f"no rollouts of step {step} to replay: {run_dir / _FOLDER}/{pattern}")
    records = [record for path in paths for record in _read(path)]
    if prompt_indices is not None:
        records = [r for r in records if r.rollout.prompt_index in prompt_indices]
    records.sort(key=lambda record: (record.rollout.prompt_index, record.rollout.sample_index))
    where = f"{run_dir / _FOLDER}/{pattern}"
    found = sorted({record.rollout.prompt_index for record in records})
    expected = list(prompt_indices if prompt_indices is not None else range(len(found)))
    if not found or found != expected:
        raise UserError(f"{where}: expected prompts {expected}, found {found}")
    if len({record.plan for record in records}) != 1:
        raise UserError(f"{where}: the lines of one step name different plans")
    rollouts = tuple(record.rollout for record in records)
    stats = RolloutStats(sum(len(rollout.token_ids) for rollout in rollouts), seconds=0.0)
    try:
        batch = RolloutBatch(rollouts, len(records) // len(found), records[0].plan, stats)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return batch, tuple(record.reward for record in records)


def _to_json(step: int, rollout: Rollout, reward: float, plan: LayerSkipPlan) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_index": rollout.prompt_index,
        "sample_index": rollout.sample_index,
        "prompt": rollout.prompt.text,
        "completion": rollout.text,
        "answer": rollout.prompt.answer,
        "reward": reward,
        "finish_reason": rollout.finish_reason,
        "plan": plan.to_dict(),
        "source": rollout.prompt.source,
        "dataset": rollout.prompt.dataset,
        "labels": dict(rollout.prompt.labels),
        "prompt_token_ids": rollout.prompt.token_ids,
        "token_ids": rollout.token_ids,
        "behavior_logprobs": [_shortest_float32(value) for value in rollout.behavior_logprobs],
    }


def _lesson_to_json(lesson: Lesson) -> dict[str, Any]:
    """Numbers that are not finite become null: they are not JSON."""
    line: dict[str, Any] = {"advantage": _rounded(lesson.advantage, 6)}
    if lesson.target_logprobs is not None:
        line["target_logprobs"] = [_rounded(v, _TARGET_DIGITS) for v in lesson.target_logprobs]
    if lesson.judge_failure is not None:
        line["judge_failure"] = lesson.judge_failure
    if lesson.components is not None:
        line["components"] = {name: _rounded(v, 6) for name, v in lesson.components.items()}
    return line


def _rounded(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _shortest_float32(value: float) -> float:
    """The number with the fewest digits that rounds to the same float32."""
    return float(str(np.float32(value)))


def _read(path: Path) -> list[_Record]:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(_from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: not a dumped rollout: {error!r}") from error
    return records


def _from_json(line: dict[str, Any]) -> _Record:
    prompt = Prompt(
        token_ids=tuple(line["prompt_token_ids"]),
        text=line["prompt"],
        answer=line["answer"],
        source=line["source"],
        # Dumps of earlier versions lack these.
        dataset=line.get("dataset", ""),
        labels=tuple(line.get("labels", {}).items()),
    )
    rollout = Rollout(
        prompt=prompt,
        prompt_index=line["prompt_index"],
        sample_index=line["sample_index"],
        token_ids=tuple(line["token_ids"]),
        behavior_logprobs=tuple(float(np.float32(v)) for v in line["behavior_logprobs"]),
        finish_reason=line["finish_reason"],
        text=line["completion"],
    )
    return _Record(rollout, line["reward"], LayerSkipPlan.from_dict(line["plan"]))
