"""Schedules of updates, whole steps, length laws and failures: what must hold for any of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_reft_mcore.planning.lengths import LengthLaw
from nested_reft_mcore.simulation.failures import (
    Course,
    daly_interval,
    daly_share,
    run_with_faults,
    young_interval,
)
from nested_reft_mcore.simulation.pipeline_schedule import (
    ScheduleTimes,
    source_of,
    stage_order,
    time_schedule,
)
from nested_reft_mcore.simulation.stragglers import Slow, Stragglers

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())


def schedule(shape: tuple[int, int, int, bool], seed: int) -> tuple[ScheduleTimes, float]:
    """Stages, chunks, micro-batches over stages, forward only; random times; and the latency."""
    stages, chunks, batches, forward_only = shape
    rng = np.random.default_rng(seed)
    size = (stages, chunks, batches * stages, 2)
    forward, backward = rng.random(size), 2 * rng.random(size)
    latency = 0.1
    return (
        time_schedule(forward, None if forward_only else backward, np.zeros(2), latency),
        latency,
    )


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(0, 2**32))
def test_micro_batches_wait_for_their_inputs_and_stages_do_one_at_a_time(
    shape: tuple[int, int, int, bool], seed: int
):
    stages, chunks, batches, forward_only = shape
    times, latency = schedule(shape, seed)
    ends = {(stage, work): end for stage, work, _, _, end in times.items}
    # Every micro-batch passes every chunk of every stage once in each direction.
    directions = 1 if forward_only else 2
    assert len(ends) == len(times.items) == directions * stages * chunks * batches * stages
    for stage in range(stages):
        mine = [item for item in times.items if item[0] == stage]
        for one, other in pairwise(mine):
            assert (one[4] <= other[3]).all()
        assert (times.busy[stage] <= times.ends[stage] + 1e-9).all()
    for stage, work, _, start, _ in times.items:
        source = source_of(stage, work, stages, chunks)
        if source is not None:
            way = latency if source[0] != stage else 0.0
            assert (start >= ends[source] + way - 1e-12).all()


@given(st.integers(1, 6), st.integers(1, 12), st.floats(0.1, 1), st.floats(0.1, 2))
def test_equal_micro_batches_take_the_closed_forms_time(
    stages: int, batches: int, forward: float, backward: float
):
    """1F1B: (m + p - 1)(f + b), arXiv 2104.04473, equation of the bubble."""
    size = (stages, 1, batches, 1)
    times = time_schedule(np.full(size, forward), np.full(size, backward), np.zeros(1))
    wanted = (batches + stages - 1) * (forward + backward)
    assert times.ends.max() == pytest.approx(wanted)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (4, 2), (4, 5)])
def test_interleaving_divides_the_bubble(stages: int, chunks: int):
    """With v chunks of a v-th of the time each the bubble is a v-th."""
    batches, forward, backward = 4 * stages, 1.0, 2.0
    size = (stages, chunks, batches, 1)
    times = time_schedule(
        np.full(size, forward / chunks), np.full(size, backward / chunks), np.zeros(1)
    )
    bubble = times.ends.max() / (batches * (forward + backward)) - 1
    assert bubble == pytest.approx((stages - 1) / chunks / batches)


def test_the_first_stage_warms_up_longest():
    orders = [stage_order(4, stage, 8, 1, forward_only=False) for stage in range(4)]
    warmups = ["".join(work.kind for work in order).index("B") for order in orders]
    assert warmups == [4, 3, 2, 1]


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["lognormal", "exponential", "fixed"]),
    st.integers(50, 5000),
    st.floats(0.1, 0.8),
    st.floats(0.1, 1.2),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_lengths_have_the_mean_that_was_asked_for(
    kind: str, limit: int, fill: float, spread: float, correlation: float, seed: int
):
    law = LengthLaw(kind, fill * limit, limit, spread, correlation)  # type: ignore[arg-type]
    drawn = law.draw(np.random.default_rng(seed), 8000, 1)
    assert drawn.min() >= 1
    assert drawn.max() <= limit
    error = 6 * drawn.std() / np.sqrt(drawn.size) + 1
    assert abs(drawn.mean() - law.mean) <= error


def test_samples_of_a_prompt_have_in_common_what_is_asked():
    for correlation in (0.0, 0.5, 1.0):
        law = LengthLaw("lognormal", 100, 10**6, 0.5, correlation)
        drawn = np.log(law.draw(np.random.default_rng(0), 20_000, 2))
        found = np.corrcoef(drawn.T)[0, 1]
        assert found == pytest.approx(correlation, abs=0.03)


def test_a_tensor_parallel_group_is_as_slow_as_its_slowest_gpu():
    stragglers = Stragglers(share=0.1, factor=1.5, named=(Slow(3, 1, 2.0), Slow(5, None, 3.0)))
    factors = stragglers.draw(np.random.default_rng(0), 400, 2, 8)
    others = np.delete(factors, [3, 5], axis=0)
    assert set(np.unique(others)) == {1.0, 1.5}
    assert (others > 1).mean() == pytest.approx(1 - 0.9**8, abs=0.05)
    assert factors[3, 1] >= 2
    assert (factors[5] >= 3).all()


@pytest.mark.parametrize("stall", [5.0, 60.0])
def test_failures_cost_what_daly_expects_and_youngs_interval_is_best(stall: float):
    course = Course(work=10.0, steps_per_save=30, stall=stall, lag=0.0, restart=100.0, mtbf=4000.0)
    found = run_with_faults(course, num_steps=6000, num_runs=60, seed=1)
    assert found.useful_share == pytest.approx(daly_share(course), abs=5 * found.error + 0.003)
    parts = found.useful_share + found.lost_share + found.saving_share + found.restarting_share
    assert parts == pytest.approx(1.0)
    best = round(young_interval(course) / course.work)
    shares = {
        steps: run_with_faults(course.with_interval(steps), 6000, 60, seed=1).useful_share
        for steps in (best // 4, best, best * 4)
    }
    assert max(shares, key=lambda steps: shares[steps]) == best
    assert daly_interval(course) == pytest.approx(young_interval(course), rel=0.2)


def test_a_checkpoint_counts_only_once_it_is_whole():
    course = Course(work=10.0, steps_per_save=10, stall=0.0, lag=0.0, restart=0.0, mtbf=2000.0)
    costs = [
        run_with_faults(
            Course(10.0, 10, 0.0, lag, 0.0, course.mtbf), num_steps=2000, num_runs=40, seed=0
        ).lost_share
        for lag in (0.0, 200.0)
    ]
    # Per failure about as much more is lost as the lag is long.
    assert costs[1] - costs[0] == pytest.approx(200 / 2000, rel=0.35)
