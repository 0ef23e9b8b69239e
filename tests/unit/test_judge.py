"""The judge: the same verdicts for any number of replicas, and what it reports."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from replica_cases import CONTEXT, on_replicas

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import RewardConfig, RewardFunctionConfig
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutBatch, RolloutStats
from nested_reft_mcore.training.judge import Judge

FUNCTIONS = """
from nested_reft_mcore.rewards.base import batch_reward, group_reward

@batch_reward
def place(items):
    return [float(i) for i in range(len(items))]

@group_reward
def members(items):
    return [float(len(items))] * len(items)

def picky(item):
    if item.completion == "no":
        raise ValueError("I will not")
    return 1.0

def broken(item):
    return 1.0 / 0.0

CALLS = []

def moody(item):
    CALLS.append(item)
    assert len(CALLS) <= 8
    return 1.0

def sees(item):
    assert item.dataset == "math" and item.labels == {"level": "5"} and item.question == "q"
    assert item.num_tokens == 2 and item.is_truncated == (item.completion == "cut")
    return 1.0
"""
TEXTS = ("a", "b", "no", "d", "cut", "f", "g", "h")
NUM_PROMPTS, GROUP_SIZE = 4, 2


@pytest.fixture(autouse=True)
def functions_module(tmp_path, monkeypatch):
    (tmp_path / "judged.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


def share_of(context: ParallelContext) -> RolloutBatch:
    share = shard_range(NUM_PROMPTS, context.data.rank, context.data.size)
    rollouts = []
    for place in share:
        prompt = Prompt((1,), "p", "7", dataset="math", labels=(("level", "5"),), question="q")
        for sample in range(GROUP_SIZE):
            text = TEXTS[place * GROUP_SIZE + sample]
            ended = "length" if text == "cut" else "stop"
            rollouts.append(Rollout(prompt, place, sample, (7, 8), (-1.0, -1.0), ended, text))
    stats = RolloutStats(1, 1.0)
    return RolloutBatch(tuple(rollouts), GROUP_SIZE, LayerSkipPlan.full(2), stats)


def rewards(*weights: tuple[str, float]) -> RewardConfig:
    functions = tuple(RewardFunctionConfig(name=f"judged:{n}", weight=w) for n, w in weights)
    return RewardConfig(functions=functions, deadline_seconds=60)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_verdicts_and_metrics_do_not_depend_on_the_replicas(num_replicas, monkeypatch):
    config = rewards(("place", 1.0), ("members", 10.0), ("picky", 100.0), ("sees", 0.0))

    def judge(context: ParallelContext):
        with Judge(config, context, keep_components=True) as judge:
            values = judge(share_of(context))
            parts = judge.components()
            judge.results(share_of(context))
            # What is evaluated between steps is not of a step.
            assert judge.components() == {}
            # Of all replicas, by prompt and completion: groups may move between them.
            assert list(parts) == [("p", text) for text in TEXTS]
            assert parts["p", "d"] == {"place": 3.0, "members": 2.0, "picky": 1.0, "sees": 1.0}
            assert parts["p", "no"]["picky"] == 0.0
            return values, judge.metrics(), judge.metrics()

    if num_replicas == 1:
        replies = [judge(CONTEXT)]
    else:
        replies = on_replicas(num_replicas, judge, monkeypatch)
    values = torch.cat([values for values, _, _ in replies])
    assert values.tolist() == [120.0, 121.0, 0.0, 123.0, 124.0, 125.0, 126.0, 127.0]
    for _, metrics, later in replies:
        assert metrics == {
            "reward/timeouts": 0.0,
            "reward/errors": 2.0,
            "reward/place/mean": 3.5,
            "reward/members/mean": 2.0,
            "reward/picky/mean": 7 / 8,
            "reward/sees/mean": 1.0,
        }
        # Means are of what was judged since; counts are of the whole run.
        assert later == {"reward/timeouts": 0.0, "reward/errors": 2.0}


def test_each_kind_of_failure_is_told_once(caplog):
    with (
        caplog.at_level(logging.WARNING),
        Judge(rewards(("picky", 1.0), ("members", 1.0)), CONTEXT) as judge,
    ):
        judge(share_of(CONTEXT))
        judge(share_of(CONTEXT))
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 8 completions could not be judged and got reward 0: picky: ValueError: I will not"
    ]


def test_a_first_batch_that_fails_whole_ends_the_run_on_every_replica(monkeypatch):
    """A reward that fails on everything gives 0 to everything, and nothing is learnt from that."""

    def judge(context: ParallelContext) -> str:
        with (
            pytest.raises(UserError) as refusal,
            Judge(rewards(("broken", 1.0), ("members", 1.0)), context) as judge,
        ):
            judge(share_of(context))
        return str(refusal.value)

    first, second = on_replicas(2, judge, monkeypatch)
    assert first == second
    assert "none of the first 8 completions could be judged" in first
    assert "broken: ZeroDivisionError: float division by zero" in first


def test_a_later_batch_may_fail_whole():
    with Judge(rewards(("moody", 1.0)), CONTEXT) as judge:
        assert judge(share_of(CONTEXT)).tolist() == [1.0] * 8
        assert judge(share_of(CONTEXT)).tolist() == [0.0] * 8
        assert judge.metrics()["reward/errors"] == 8.0


def test_a_reward_that_cannot_be_imported_stops_every_replica_before_the_first_step(monkeypatch):
    def enter(context: ParallelContext) -> str:
        with pytest.raises(UserError) as refusal, Judge(rewards(("nobody", 1.0)), context):
            raise AssertionError("the judge was entered")
        return str(refusal.value)

    first, second = on_replicas(2, enter, monkeypatch)
    assert first == second
    assert "'judged:nobody': cannot be imported" in first
