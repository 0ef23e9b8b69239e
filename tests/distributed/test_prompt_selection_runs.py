"""MoPPS over a mixture in real runs: the same prompts for any replicas, and after a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_cases import metrics_of, run, write_room

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MIXTURE = [
    {"path": "task/train.jsonl", "name": "sums", "weight": 2},
    {"path": "task/eval.jsonl", "name": "others", "weight": 1},
]
QUICK = (
    *("evaluation.interval=0", "data.eval_path=null", "logging.tensorboard=false"),
    *("data.selection.policy=mopps", "data.selection.candidates=3", "train.updates_per_step=1"),
    *("algorithm.filter_groups=true", "algorithm.max_refills=1", "reward.name=luck.py:luck"),
    *("data.train_path=null", f"data.train={json.dumps(MIXTURE)}"),
)
LUCK = """
import zlib

def luck(item):
    return float(zlib.crc32((item.prompt + item.completion).encode()) % 3 == 0)
"""
"""Scores that differ within groups, from a policy that has learned nothing."""


def lines_of(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The rollouts of a step, in the order of the global batch."""
    paths = run_dir.glob(f"rollouts/step_{step:06d}.dp*.jsonl")
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["prompt_index"], line["sample_index"]))


def test_replicas_and_restarts_choose_the_same_prompts(tmp_path):
    """Four steps look at some 50 to 100 places of data sets of 24 and 12 prompts."""
    write_room(tmp_path)
    (tmp_path / "luck.py").write_text(LUCK)
    train = ("train", "config.yaml", *QUICK)
    run(tmp_path, *train, "run_dir=whole", "train.num_steps=4")
    two = (*train, "run_dir=parts", "parallel.data_parallel_size=2")
    run(tmp_path, *two, "train.num_steps=2")
    # One replica goes on where two stopped, in the middle of an epoch of each set.
    run(tmp_path, *train, "run_dir=parts", "train.num_steps=4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for step in range(4):
        ours, theirs = ([line["source"] for line in lines_of(one, step)] for one in (parts, whole))
        assert ours == theirs, f"step {step}"
    lines = [line for step in range(4) for line in lines_of(whole, step)]
    assert {line["dataset"] for line in lines} == {"sums", "others"}
    assert {line["reward"] for line in lines} == {0.0, 1.0}
    # The last line of a run holds nothing but times.
    ours, theirs = (
        [line for line in metrics_of(one) if "critic/score/mean" in line] for one in (whole, parts)
    )
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    for key in ("selection/predicted_success", "selection/known_share", "data/num_prompts"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    assert ours[-1]["selection/known_share"] > ours[0]["selection/known_share"] > 0
