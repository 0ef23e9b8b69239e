"""Micro-batches by tokens: every row once, within the budget, few, even, and little padding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rollout.packing import (
    deal_rows,
    fill_micro_batches,
    num_micro_batches,
    round_up,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=24)
MULTIPLE = st.sampled_from([1, 2, 4])


def places(rows: list[int], lengths: list[int], multiple: int) -> int:
    return len(rows) * round_up(max(lengths[row] for row in rows), multiple)


@given(LENGTHS, st.integers(40, 300), MULTIPLE, st.integers(0, 5))
def test_every_row_once_and_within_the_budget(
    lengths: list[int], budget: int, multiple: int, more: int
) -> None:
    needed = num_micro_batches(lengths, budget, multiple)
    filled = fill_micro_batches(lengths, budget, needed + more, multiple)
    assert len(filled) == needed + more
    assert sorted(row for rows in filled for row in rows) == list(range(len(lengths)))
    used = [rows for rows in filled if rows]
    assert all(places(rows, lengths, multiple) <= budget for rows in used)
    # Only where rows have run out is a micro-batch empty, and then it is one of the last.
    assert len(used) == min(len(filled), len(lengths))
    assert all(filled[: len(used)])


@given(LENGTHS, st.integers(40, 300), MULTIPLE)
def test_as_few_as_neighbors_in_length_allow(
    lengths: list[int], budget: int, multiple: int
) -> None:
    """Dynamic programming over all ways to cut the sorted rows finds none with fewer."""
    ordered = sorted(lengths, reverse=True)
    fewest = [0]
    for end in range(1, len(ordered) + 1):
        starts = [s for s in range(end) if (end - s) * round_up(ordered[s], multiple) <= budget]
        fewest.append(1 + min(fewest[s] for s in starts))
    assert num_micro_batches(lengths, budget, multiple) == fewest[-1]


@given(LENGTHS, MULTIPLE, st.integers(1, 6))
def test_the_fullest_is_as_small_as_can_be(lengths: list[int], multiple: int, wanted: int) -> None:
    budget = 40 * len(lengths)
    filled = [rows for rows in fill_micro_batches(lengths, budget, wanted, multiple) if rows]
    fullest = max(places(rows, lengths, multiple) for rows in filled)
    longest = round_up(max(lengths), multiple)
    if fullest > longest:
        assert num_micro_batches(lengths, fullest - 1, multiple) > wanted


@given(LENGTHS, st.integers(1, 6))
def test_replicas_have_equally_much_to_do(lengths: list[int], replicas: int) -> None:
    dealt = deal_rows(lengths, replicas)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(lengths)))
    assert dealt == [sorted(rows) for rows in dealt]
    loads = [sum(lengths[row] for row in rows) for rows in dealt]
    assert max(loads) - min(loads) <= max(lengths)
    # Before its last and shortest row a replica had no more to do than any has in the end.
    for rows, load in zip(dealt, loads, strict=True):
        assert not rows or load - min(lengths[row] for row in rows) <= min(loads)
    assert sum(1 for rows in dealt if rows) == min(replicas, len(lengths))


def test_lengths_that_differ_need_less_room_than_rows_of_one_shape() -> None:
    lengths = [5, 40, 6, 38, 5, 7, 36, 6]
    filled = fill_micro_batches(lengths, 80, num_micro_batches(lengths, 80))
    assert sum(places(rows, lengths, 1) for rows in filled) < 1.1 * sum(lengths)
    assert 2 * sum(lengths) < 8 * 40


def test_a_sequence_beyond_the_budget_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch=15.* takes 16 tokens; expec"):
        num_micro_batches([3, 15], 15, 4)
    assert num_micro_batches([3, 15], 16, 4) == 2
