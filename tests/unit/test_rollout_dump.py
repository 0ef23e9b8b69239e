"""Rollouts survive the disk bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rollout.dump import (
    Lesson,
    dump_rollouts,
    dump_vocabulary,
    load_rollouts,
    rollout_file,
)
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutBatch, RolloutStats

PLAN = LayerSkipPlan.parse("1,2.attention", 4)


def make_batch(first_prompt: int, num_prompts: int, group_size: int = 2) -> RolloutBatch:
    random = np.random.default_rng(first_prompt)
    rollouts = []
    for index in range(first_prompt, first_prompt + num_prompts):
        prompt = Prompt((1, 2, index), f"wie viel? \u00fc\n{index}", answer="7", source="a.jsonl:3")
        for sample in range(group_size):
            length = int(random.integers(1, 6))
            logprobs = tuple(float(np.float32(-x)) for x in random.exponential(3.0, length))
            rollouts.append(
                Rollout(prompt, index, sample, tuple(range(length)), logprobs, "stop", "# 7 ,")
            )
    stats = RolloutStats(sum(len(r.token_ids) for r in rollouts), seconds=1.5)
    return RolloutBatch(tuple(rollouts), group_size, PLAN, stats)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    batch = make_batch(0, 3)
    rewards = [0.1 * i for i in range(6)]
    path = dump_rollouts(tmp_path, 12, 0, batch, rewards)
    assert path == tmp_path / "rollouts" / "step_000012.dp0.jsonl"
    read, read_rewards = load_rollouts(tmp_path, 12)
    assert read.rollouts == batch.rollouts
    assert read_rewards == tuple(rewards)
    assert (read.plan, read.group_size) == (PLAN, 2)
    assert read.stats.generated_tokens == batch.stats.generated_tokens
    assert [p.name for p in path.parent.iterdir()] == [path.name], "something was left beside it"


def test_lines_are_for_people_too(tmp_path: Path) -> None:
    path = dump_rollouts(tmp_path, 0, 0, make_batch(0, 1, 1), [1.0])
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line["completion"] == "# 7 ,"
    assert line["reward"] == 1.0
    assert line["plan"] == {"num_layers": 4, "skipped": "1,2.attention"}
    assert len(line["behavior_logprobs"]) == len(line["token_ids"])
    assert all(len(repr(value)) <= 14 for value in line["behavior_logprobs"])


def test_replicas_are_joined_and_cut_anew(tmp_path: Path) -> None:
    whole = make_batch(0, 2).rollouts + make_batch(2, 2).rollouts
    dump_rollouts(tmp_path, 3, 0, make_batch(0, 2), [0.0, 1.0, 2.0, 3.0])
    dump_rollouts(tmp_path, 3, 1, make_batch(2, 2), [4.0, 5.0, 6.0, 7.0])
    read, rewards = load_rollouts(tmp_path, 3)
    assert read.rollouts == whole
    assert rewards == tuple(float(i) for i in range(8))
    part, rewards = load_rollouts(tmp_path, 3, range(1, 3))
    assert part.rollouts == whole[2:6]
    assert rewards == (2.0, 3.0, 4.0, 5.0)


def test_missing_steps_and_prompts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rollouts of step 4 .*step_000004"):
        load_rollouts(tmp_path, 4)
    dump_rollouts(tmp_path, 4, 0, make_batch(0, 2), [0.0] * 4)
    with pytest.raises(UserError, match=r"expected prompts \[1, 2\], found \[1\]"):
        load_rollouts(tmp_path, 4, range(1, 3))


def test_broken_lines_are_named(tmp_path: Path) -> None:
    path = dump_rollouts(tmp_path, 1, 0, make_batch(0, 1), [0.0, 1.0])
    text = path.read_text()
    path.write_text(text + "{\n")
    with pytest.raises(UserError, match=rf"{path.name}:3: not a dumped rollout"):
        load_rollouts(tmp_path, 1)
    path.write_text(text.splitlines()[1] + "\n")
    with pytest.raises(UserError, match="is not sample 0"):
        load_rollouts(tmp_path, 1)


def test_what_the_update_made_of_a_rollout_stands_in_its_line(tmp_path: Path) -> None:
    batch = make_batch(0, 1)
    first = [float("nan"), *[-0.123456] * (len(batch.rollouts[0].token_ids) - 1)]
    parts = {"math_verify": 1.0, "format": float("inf")}
    lessons = [Lesson(0.5, first, components=parts), Lesson(-1.0, None, "timeout")]
    path = dump_rollouts(tmp_path, 1, 0, batch, [1.0, 0.0], lessons)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert lines[0]["target_logprobs"] == [None, *[-0.1235] * (len(first) - 1)]
    assert lines[0]["components"] == {"math_verify": 1.0, "format": None}
    assert "components" not in lines[1]
    assert (lines[0]["advantage"], lines[1]["advantage"]) == (0.5, -1.0)
    assert "judge_failure" not in lines[0]
    assert lines[1]["judge_failure"] == "timeout"
    assert "target_logprobs" not in lines[1]
    # None of it is needed, nor in the way, where rollouts are replayed.
    assert load_rollouts(tmp_path, 1)[0].rollouts == batch.rollouts


def test_vocabulary_is_written_once_whatever_it_holds(tmp_path: Path) -> None:
    texts = ["a", "\ud800", "\x00", "</script>"]
    path = dump_vocabulary(tmp_path, 4, lambda ids: texts[ids[0]])
    assert json.loads(path.read_text(encoding="utf-8")) == texts
    dump_vocabulary(tmp_path, 4, lambda _: "other")
    assert json.loads(path.read_text(encoding="utf-8")) == texts
    assert [p.name for p in path.parent.iterdir()] == ["vocabulary.json"]


def test_one_reward_for_each_rollout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 rollouts but 3 rewards"):
        dump_rollouts(tmp_path, 1, 0, make_batch(0, 2), [0.0] * 3)
    with pytest.raises(ValueError, match="4 rollouts but 1 lessons"):
        dump_rollouts(tmp_path, 1, 0, make_batch(0, 2), [0.0] * 4, [Lesson(0.0)])
    assert not rollout_file(tmp_path, 1, 0).exists()
