"""A weighted mixture is a pure function of (seed, place): exact shares, each part in epochs."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.mixture import BLOCK, Mixture
from nested_reft_mcore.data.stream import Part, PromptStream

PARTS = st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4).map(
    lambda pairs: [Part(f"p{i}", size, weight) for i, (size, weight) in enumerate(pairs)]
)
SEEDS = st.integers(0, 2**40)
FEW = settings(max_examples=8)
"""A block is a thousand draws in plain Python."""


def stream(parts, seed, per_step=7):
    return PromptStream(sum(part.size for part in parts), per_step, seed, parts=parts)


def part_of(index, parts):
    for place, part in enumerate(parts):
        if index < part.size:
            return place
        index -= part.size
    raise AssertionError("beyond the last part")


@FEW
@given(PARTS, SEEDS)
def test_every_block_has_each_part_in_its_share(parts, seed):
    counts = Counter(part_of(index, parts) for index in stream(parts, seed).take(BLOCK))
    total = sum(part.weight for part in parts)
    for place, part in enumerate(parts):
        assert abs(counts[place] - BLOCK * part.weight / total) < 1


@FEW
@given(PARTS, SEEDS)
def test_each_part_goes_through_epochs_of_its_own(parts, seed):
    taken = stream(parts, seed).take(2 * BLOCK)
    for place, part in enumerate(parts):
        own = [index for index in taken if part_of(index, parts) == place]
        first = sum(other.size for other in parts[:place])
        for begin in range(0, len(own) - part.size, part.size):
            assert sorted(own[begin : begin + part.size]) == list(range(first, first + part.size))


@FEW
@given(PARTS, SEEDS, st.integers(0, 2500))
def test_resume_equals_uninterrupted(parts, seed, before):
    whole = stream(parts, seed)
    whole.take(before)
    resumed = stream(parts, seed, per_step=3)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.take(50) == whole.take(50)


def test_other_weights_or_data_are_refused():
    parts = [Part("a", 3, 1.0), Part("b", 3, 1.0)]
    state = stream(parts, 0).state_dict()
    with pytest.raises(
        UserError, match=r"its share of each set of data\.train, in places of 1,000"
    ):
        stream([Part("a", 3, 2.0), Part("b", 3, 1.0)], 0).load_state_dict(state)
    moved = [Part("a", 2, 1.0), Part("b", 4, 1.0)]
    with pytest.raises(
        UserError, match=r"sets? of data\.train is \[3, 3\], this run's is \[2, 4\]"
    ):
        stream(moved, 0).load_state_dict(state)
    named = PromptStream(6, 2, 0, fingerprint="x")
    with pytest.raises(UserError, match=r"fingerprint of .* is x, this run's is y"):
        PromptStream(6, 2, 0, fingerprint="y").load_state_dict(named.state_dict())
    # As checkpoints of earlier versions are.
    named.load_state_dict({"position": 4, "num_prompts": 6, "seed": 0})
    assert named.position == 4


def test_a_weight_below_a_thousandth_is_refused():
    with pytest.raises(UserError, match="the weight of b is below a thousandth"):
        Mixture(["a", "b"], [1.0, 1e-4], 0)


def test_weights_beyond_floats_are_refused():
    with pytest.raises(UserError, match=r"data\.train: the weights 1e\+308, 1e\+308 are too large"):
        Mixture(["a", "b"], [1e308, 1e308], seed=1)
