"""MoPPS in real runs: the same prompts for every number of replicas, and after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_cases import metrics_of, run, write_room

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

QUICK = (
    *("evaluation.interval=0", "data.eval_path=null", "logging.tensorboard=false"),
    *("data.selection.policy=mopps", "data.selection.candidates=3", "train.updates_per_step=1"),
    *("algorithm.filter_groups=true", "algorithm.max_refills=1"),
)


def sources(run_dir: Path, step: int) -> list[str]:
    """Where the prompts of a step came from, in the order of the global batch."""
    paths = run_dir.glob(f"rollouts/step_{step:06d}.dp*.jsonl")
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [line["source"] for line in sorted(lines, key=lambda line: line["prompt_index"])]


def test_replicas_and_restarts_choose_the_same_prompts(tmp_path):
    write_room(tmp_path)
    run(tmp_path, "sft", "config.yaml", "data.train_path=task/sft.jsonl", "run_dir=warm")
    train = ("train", "config.yaml", "--checkpoint", "warm/checkpoints", *QUICK)
    run(tmp_path, *train, "run_dir=whole", "train.num_steps=4")
    two = (*train, "run_dir=parts", "parallel.data_parallel_size=2")
    run(tmp_path, *two, "train.num_steps=2")
    # One replica goes on where two stopped.
    run(tmp_path, *train, "run_dir=parts", "train.num_steps=4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for step in range(4):
        assert sources(parts, step) == sources(whole, step), f"step {step}"
    # The last line of a run holds nothing but times.
    ours, theirs = (
        [line for line in metrics_of(one) if "critic/score/mean" in line] for one in (whole, parts)
    )
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    for key in ("selection/predicted_success", "selection/known_share", "data/num_prompts"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    assert ours[-1]["selection/known_share"] > ours[0]["selection/known_share"] > 0
