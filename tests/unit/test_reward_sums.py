"""Weighted sums, groups and whole batches: who is called with what, and what a failure costs."""

import os

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import RewardFunctionConfig
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.calls import MAX_CHUNK, groups_of, plan_chunks
from nested_reft_mcore.rewards.pool import RewardPool

FUNCTIONS = '''
import os
from nested_reft_mcore.rewards.base import batch_reward, group_reward

def size(item, scale=1.0):
    return scale * len(item.completion)

@group_reward
def rank(items):
    """Share of the others of the prompt that are shorter."""
    lengths = [len(item.completion) for item in items]
    return [sum(other < length for other in lengths) / len(items) for length in lengths]

@batch_reward
def first(items):
    return [float(item.completion == items[0].completion) for item in items]

@group_reward
def too_few(items):
    return [1.0]

@group_reward
def moody(items):
    if any(item.completion == "exit" for item in items):
        os._exit(3)
    if any(item.completion == "raise" for item in items):
        raise RuntimeError("no")
    return [1.0] * len(items)

def fields(item):
    assert item.labels["level"] == "Level 5" and item.dataset == "math" and item.num_tokens == 7
    return 1.0
'''


@pytest.fixture(autouse=True)
def functions_module(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


def weighted(*entries: tuple[str, float]) -> list[RewardFunctionConfig]:
    return [RewardFunctionConfig(name=f"some_rewards:{name}", weight=w) for name, w in entries]


def grouped(*completions: str, size: int = 2) -> list[RewardItem]:
    return [RewardItem("", text, "", group=i // size) for i, text in enumerate(completions)]


def test_items_groups_and_the_batch_are_summed_by_weight():
    functions = weighted(("size", 1.0), ("rank", 10.0), ("first", -100.0))
    functions.append(
        RewardFunctionConfig(name="some_rewards:size", label="big", options={"scale": 2.0})
    )
    with RewardPool(functions, 2, deadline_seconds=60) as pool:
        results = pool.score(grouped("a", "bb", "ccc", "d", "a", "eeee"))
    assert [result.components for result in results] == [
        (1.0, 0.0, 1.0, 2.0),
        (2.0, 0.5, 0.0, 4.0),
        (3.0, 0.5, 0.0, 6.0),
        (1.0, 0.0, 0.0, 2.0),
        (1.0, 0.0, 1.0, 2.0),
        (4.0, 0.5, 0.0, 8.0),
    ]
    assert [result.value for result in results] == [-97.0, 11.0, 14.0, 3.0, -97.0, 17.0]


def test_a_failed_group_costs_its_own_items_and_only_that_function():
    functions = weighted(("size", 1.0), ("moody", 5.0))
    with RewardPool(functions, deadline_seconds=60) as pool:
        results = pool.score(grouped("a", "exit", "bb", "ccc", "raise", "dd"))
    assert [result.value for result in results] == [0.0, 0.0, 7.0, 8.0, 0.0, 0.0]
    assert [result.components[0] for result in results] == [1.0, 4.0, 2.0, 3.0, 5.0, 2.0]
    assert results[0].error == "moody: the worker left with exit code 3"
    assert results[4].error == "moody: RuntimeError: no"
    assert (pool.errors, pool.timeouts) == (4, 0)


def test_a_function_that_gives_too_few_numbers_is_an_error():
    with RewardPool(weighted(("too_few", 1.0)), deadline_seconds=60) as pool:
        results = pool.score(grouped("a", "b"))
    assert {result.error for result in results} == {"ValueError: 1 rewards for 2 completions"}


def test_functions_see_what_the_data_says():
    item = RewardItem("", "", "", 0, 7, False, "math", "", {"level": "Level 5"})
    with RewardPool(weighted(("fields", 1.0)), deadline_seconds=60) as pool:
        (result,) = pool.score([item])
    assert (result.value, result.error) == (1.0, None)


def test_a_file_is_a_module_too(tmp_path):
    with RewardPool(f"{tmp_path}/some_rewards.py:size", deadline_seconds=60) as pool:
        assert [result.value for result in pool.score(grouped("abc"))] == [3.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("some_rewards:size", {"scal": 2}, "unexpected keyword argument 'scal'; it takes.*scale"),
        ("length", {}, "missing a required.*max_tokens"),
        ("some_rewards:os", {}, "is a module; expected a function"),
    ],
)
def test_options_that_do_not_fit_are_the_users_mistake(name, options, message):
    functions = [RewardFunctionConfig(name=name, options=options)]
    with RewardPool(functions) as pool, pytest.raises(UserError, match=message):
        pool.scopes()


def test_chunks_hold_whole_groups_and_every_call_once():
    items = grouped(*["x"] * 1000, size=8)
    chunks = plan_chunks(items, ("item", "group", "batch"), 2)
    groups = set(groups_of(items))
    calls = [call for chunk in chunks for call in chunk.calls]
    assert sorted(call.items[0] for call in calls if call.function == 0) == list(range(1000))
    assert {call.items for call in calls if call.function == 1} == groups
    assert [call.items for call in calls if call.function == 2] == [tuple(range(1000))]
    assert chunks[0].calls[0].function == 2
    for chunk in chunks[1:]:
        assert len(chunk.items) <= MAX_CHUNK + 8
        assert set(chunk.items) == {place for group in groups_of(items) for place in group} & set(
            chunk.items
        )
        assert all(set(group) <= set(chunk.items) for group in groups if group[0] in chunk.items)


def test_groups_need_not_lie_side_by_side():
    items = [RewardItem("", "", "", group=g) for g in (1, 2, 1, 3, 2)]
    assert groups_of(items) == [(0, 2), (1, 4), (3,)]
    assert plan_chunks([], ("item",), 2) == []
