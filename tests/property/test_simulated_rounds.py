"""What the simulation of a generation may never do, whatever lengths, lanes and machines."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_reft_mcore.planning.slots import count_rounds
from nested_reft_mcore.rollout.completion import StopRule
from nested_reft_mcore.rollout.scheduler import Batching, Scheduler
from nested_reft_mcore.rollout.types import Prompt, SamplingParams
from nested_reft_mcore.simulation.decode_timing import Item, Passes, record_passes, time_passes

SAMPLES = 3
WORK = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 12), min_size=SAMPLES, max_size=SAMPLES)),
    min_size=1,
    max_size=5,
)
BATCHINGS: st.SearchStrategy[Batching] = st.sampled_from(["continuous", "static"])
Work = list[tuple[int, list[int]]]


def real_rounds(
    work: Work, slots: int, lanes: int, budget: int, batching: Batching
) -> list[list[tuple[int, int, int, int]]]:
    """Rows, places, prompt tokens and their pairs of each round and lane, by the scheduler."""
    longest = max(max(group) for _, group in work)
    scheduler = Scheduler(
        StopRule(SamplingParams(longest), None),
        num_slots=slots,
        num_lanes=lanes,
        max_num_batched_tokens=budget,
        batching=batching,
    )
    scheduler.submit([Prompt(tuple(range(tokens)), "") for tokens, _ in work], SAMPLES)
    for completion in scheduler.completions:
        completion.limit = work[completion.prompt][1][completion.sample]
    rounds, under_way = [], dict.fromkeys(range(len(scheduler.lanes)))
    while not scheduler.is_done:
        loads = []
        for lane in scheduler.lanes:
            step = under_way[lane.number]
            if step is not None:
                scheduler.accept(lane, step, [[0] for _ in step.rows], 0.0)
            step = under_way[lane.number] = scheduler.next_step(lane)
            rows = step.rows if step else []
            pieces = step.pieces if step else []
            pairs = sum(p.start + i + 1 for p in pieces for i in range(p.length))
            places = sum(row.position + 1 for row in rows)
            loads.append((len(rows), places, sum(p.length for p in pieces), pairs))
        if any(rows or tokens for rows, _, tokens, _ in loads):
            rounds.append(loads)
    return rounds


@settings(deadline=None, max_examples=60)
@given(WORK, st.integers(1, 9), st.integers(1, 4), st.integers(1, 60), BATCHINGS)
def test_every_round_is_the_schedulers(
    work: Work, slots: int, lanes: int, budget: int, batching: Batching
):
    slots = min(slots, SAMPLES * len(work))
    found = count_rounds(
        [tokens for tokens, _ in work],
        [group for _, group in work],
        num_slots=slots,
        num_lanes=lanes,
        max_num_batched_tokens=budget,
        batching=batching,
    )
    wanted = real_rounds(work, slots, lanes, budget, batching)
    assert found.count.sum() == len(wanted)
    first = 0
    for stretch, count in enumerate(found.count.tolist()):
        real = np.asarray(wanted[first : first + count])
        first += count
        assert (real[..., 0] == found.rows[stretch]).all()
        assert real[..., 1].mean(axis=0) == pytest.approx(found.keys[stretch])
        assert (real[..., 2] == found.piece_tokens[stretch]).all()
        assert (real[..., 3] == found.piece_pairs[stretch]).all()
    assert found.prefilled_tokens == sum(tokens - 1 for tokens, _ in work)
    asked = sum(sum(group) for _, group in work)
    if batching == "continuous":
        # Tokens out are tokens asked for.
        assert found.decoded_tokens == asked
    else:
        assert found.decoded_tokens >= asked


@st.composite
def passes(draw: st.DrawFn, equal_lanes: bool = False) -> Passes:
    """Any times, any number of rounds, lanes that come and go."""
    sizes = st.integers(1, 3)
    replicas, stretches, stages = draw(st.integers(1, 2)), draw(sizes), draw(st.integers(1, 4))
    chunks, lanes = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    active = np.ones((replicas, stretches, lanes), bool)
    if not equal_lanes:
        active = rng.random(active.shape) < 0.8
    seconds = rng.choice([0.1, 1.0, 1.7, 5.0], (replicas, stretches, stages, chunks, lanes))
    messages = rng.choice([0.0, 0.3], (replicas, stretches, lanes)) * (stages > 1)
    return Passes(
        rng.choice([0, 1, 2, 5, 30], (replicas, stretches)),
        seconds * active[:, :, None, None, :],
        messages,
        active,
    )


@settings(deadline=None, max_examples=40)
@given(passes())
def test_no_stage_does_two_things_at_once_and_nothing_starts_before_its_inputs(made: Passes):
    ends = time_passes(made)
    stages = made.seconds.shape[2]
    for replica in range(len(ends)):
        items = record_passes(made, replica, walked=None)
        for stage in range(stages):
            mine = [item for item in items if item.stage == stage]
            assert all(one.end <= other.start for one, other in pairwise(mine))
            # Jumping over rounds ends when walking through them does.
            last = mine[-1].end if mine else 0.0
            assert last == pytest.approx(ends[replica, stage], rel=1e-9)
            busy = sum(item.end - item.start for item in mine)
            assert busy == pytest.approx(made.busy[replica, stage])
        check_inputs(items, made, replica)


def check_inputs(items: list[Item], made: Passes, replica: int) -> None:
    """A pass follows the same lane's pass on the stage before, chunk before, or round before."""
    stages, chunks = made.seconds.shape[2:4]
    ended: dict[tuple[int, int, int, int], float] = {}
    lane_ended: dict[int, float] = defaultdict(lambda: -math.inf)
    stretch_of = np.repeat(np.arange(made.count.shape[1]), made.count[replica])
    for item in items:
        message = made.messages[replica, stretch_of[item.round], item.lane]
        if item.stage > 0:
            before = ended[item.round, item.lane, item.chunk, item.stage - 1] + message
        elif item.chunk > 0:
            before = ended[item.round, item.lane, item.chunk - 1, stages - 1] + message
        else:
            before = lane_ended[item.lane]
        assert item.start >= before - 1e-9
        ended[item.round, item.lane, item.chunk, item.stage] = item.end
        if item.stage == stages - 1 and item.chunk == chunks - 1:
            lane_ended[item.lane] = item.end + (message if stages > 1 else 0.0)


@settings(deadline=None, max_examples=40)
@given(passes(), st.integers(1, 5))
def test_a_timeline_in_jumps_covers_the_same_time(made: Passes, walked: int):
    whole = record_passes(made, 0, walked=None)
    short = record_passes(made, 0, walked=walked)
    for stage in range(made.seconds.shape[2]):
        busy = [sum(i.busy for i in items if i.stage == stage) for items in (whole, short)]
        assert busy[0] == pytest.approx(busy[1])
        mine = [item for item in short if item.stage == stage]
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(mine))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 500), st.floats(0.01, 1.0))
def test_equal_stages_and_lanes_keep_the_closed_forms_pace(
    stages: int, lanes: int, count: int, seconds: float
):
    """A round takes the longer of a stage's lanes and a lane's stages; the first fills the pipe."""
    shape = (1, 1, stages, 1, lanes)
    made = Passes(
        np.asarray([[count]]),
        np.full(shape, seconds),
        np.zeros((1, 1, lanes)),
        np.ones((1, 1, lanes), bool),
    )
    pace = max(stages, lanes) * seconds
    wanted = (count - 1) * pace + (stages + lanes - 1) * seconds
    assert time_passes(made).max() == pytest.approx(wanted)
