"""Every epoch is a permutation, a resumed stream is the uninterrupted one, shards are disjoint."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.stream import PromptStream, shard_range

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**40)


def read(stream: PromptStream, count: int) -> list[int]:
    """The first `count` items, rounded up to whole steps."""
    items: list[int] = []
    while len(items) < count:
        items += stream.next()
    return items


@given(SIZES, SIZES, SEEDS)
def test_every_epoch_is_a_permutation(num_prompts, per_step, seed):
    items = read(PromptStream(num_prompts, per_step, seed), 3 * num_prompts)
    for epoch in range(3):
        part = items[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert sorted(part) == list(range(num_prompts))


@given(SIZES, SIZES, SEEDS, st.integers(0, 6), st.integers(0, 3))
def test_resume_equals_uninterrupted(num_prompts, per_step, seed, num_before, num_ahead):
    whole = PromptStream(num_prompts, per_step, seed)
    for _ in range(num_before):
        whole.next()
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PromptStream(num_prompts, per_step, seed)
    for _ in range(num_ahead):
        resumed.next()
    resumed.load_state_dict(state)
    assert [resumed.next() for _ in range(4)] == [whole.next() for _ in range(4)]
    assert resumed.state_dict() == whole.state_dict()


@given(SIZES, SIZES, SIZES, SEEDS)
def test_the_order_does_not_depend_on_the_step_size(num_prompts, per_step, other, seed):
    count = 2 * num_prompts
    items = read(PromptStream(num_prompts, per_step, seed), count)[:count]
    assert items == read(PromptStream(num_prompts, other, seed), count)[:count]


@given(st.integers(0, 100), st.integers(1, 16))
def test_shards_are_disjoint_contiguous_and_even(count, size):
    shards = [shard_range(count, rank, size) for rank in range(size)]
    assert [place for shard in shards for place in shard] == list(range(count))
    lengths = {len(shard) for shard in shards}
    assert max(lengths) - min(lengths) <= 1


def test_epochs_and_seeds_differ():
    items = read(PromptStream(50, 50, 0), 100)
    assert items[:50] != items[50:]
    assert items[:50] != read(PromptStream(50, 50, 1), 50)
    assert items[:50] != list(range(50))


@pytest.mark.parametrize("other", [PromptStream(9, 2, 0), PromptStream(10, 2, 1)])
def test_a_state_of_other_data_is_refused(other):
    with pytest.raises(UserError, match=r"was reading other data: its (number of prompts|seed)"):
        other.load_state_dict(PromptStream(10, 2, 0).state_dict())


def test_the_state_of_a_replay_is_refused():
    with pytest.raises(UserError, match="its run replayed rollouts"):
        PromptStream(10, 2, 0).load_state_dict({})


@pytest.mark.parametrize(("num_prompts", "per_step"), [(0, 1), (1, 0)])
def test_empty_streams_are_refused(num_prompts, per_step):
    with pytest.raises(ValueError, match="must be positive"):
        PromptStream(num_prompts, per_step, 0)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_replicas_is_refused(rank):
    with pytest.raises(ValueError, match="of 2 replicas"):
        shard_range(4, rank, 2)
