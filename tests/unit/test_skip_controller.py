"""The controller against simulated plants, whose KL grows with what is skipped."""

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.skip_controller import (
    METRIC_NAMES,
    ControllerSettings,
    ControllerState,
    off_policyness,
    update,
    wait_before,
)

Plant = Callable[[int, int], float]
"""(step, level) to the KL of the step."""
KL = ControllerSettings("kl", target=0.5, levels=tuple(range(9)), patience=4, max_wait=64)


def growing(scale: float = 0.06, noise: float = 0.2, drift: float = 0.0, seed: int = 0) -> Plant:
    """KL scale * k^1.5, times (1 + drift) per step, with that relative deviation."""
    random_numbers = random.Random(seed)

    def measure(step: int, level: int) -> float:
        spread = 1.0 + noise * random_numbers.gauss(0.0, 1.0)
        return scale * (1.0 + drift * step) * level**1.5 * spread

    return measure


def drive(
    plant: Plant, num_steps: int, settings: ControllerSettings = KL, start: int = 4
) -> list[int]:
    """The level of every step."""
    state, levels = ControllerState.start(settings, start), []
    for step in range(num_steps):
        levels.append(state.level)
        # What a run does when it is resumed: the state goes through JSON.
        state = ControllerState.from_dict(json.loads(json.dumps(state.to_dict())), settings)
        state = update(settings, state, {METRIC_NAMES["kl"]: plant(step, state.level)})
    return levels


def num_changes(levels: list[int]) -> int:
    return sum(one != other for one, other in pairwise(levels))


@pytest.mark.parametrize("start", [0, 2, 8])
@pytest.mark.parametrize("seed", range(5))
def test_it_settles_where_the_limit_is(start: int, seed: int) -> None:
    # 0.06 * k^1.5 is 0.31 at 3, 0.48 at 4 and 0.67 at 5: the most that stays below 0.5 is 4, and 3
    # the most that leaves the margin of the hysteresis above it.
    levels = drive(growing(seed=seed), 600, start=start)
    settled = levels[100:]
    assert sum(level in (3, 4) for level in settled) > 0.95 * len(settled)
    assert max(settled) <= 5
    # Each trial of a level is two changes; between trials lie 64 steps, once it has failed 4 times.
    assert num_changes(settled) <= 2 * (500 // 64) + 2 * 4


def test_a_level_that_does_not_hold_is_tried_ever_less_often() -> None:
    def cliff(_step: int, level: int) -> float:
        return 0.1 if level <= 3 else 5.0

    levels = drive(cliff, 400, start=3)
    tried = [step for step, level in enumerate(levels) if level == 4]
    # A step, not a window, is what each trial costs.
    assert [later - earlier for earlier, later in pairwise(tried)] == [9, 17, 33, *[65] * 5]
    assert min(levels) == 3


@pytest.mark.parametrize(("held", "failures"), [(28, 4), (32, 3)])
def test_a_level_that_held_as_long_as_its_bar_is_not_barred_longer(held, failures) -> None:
    # Three failures: a bar of 4 * 2^3 steps.
    state = ControllerState(4, "kl", held=held - 1, failures=((4, 3),))
    after = update(KL, state, {"rollout_corr/kl": 9.0})
    assert after.level == 3
    assert after.num_failures(4) == failures


def test_nothing_is_skipped_when_nothing_helps_and_trials_become_rare() -> None:
    levels = drive(lambda _step, level: 3.0 * level, 1000, start=6)
    assert levels[:7] == [6, 5, 4, 3, 2, 1, 0]
    skipping = [step for step, level in enumerate(levels) if level]
    assert max(levels[7:]) == 1
    # Every 64 steps one that is bad: careful, and never given up.
    assert 1000 // 66 <= len(skipping) <= 1000 // 64 + 12
    assert skipping[-1] > 900


def test_it_recovers_when_the_plant_improves() -> None:
    def improving(step: int, level: int) -> float:
        return (3.0 if step < 300 else 0.02) * level

    levels = drive(improving, 700, start=6)
    assert max(levels[20:300]) == 1
    assert levels[-1] == 8
    # Where all is well there is nothing to change.
    assert num_changes(levels[-150:]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_it_follows_a_plant_that_drifts(seed: int) -> None:
    # In the end KL is seven times what it was: 0.42 k^1.5, of which 1 is below the limit.
    levels = drive(growing(drift=0.01, seed=seed), 600, start=4)
    assert sum(levels[:50]) / 50 > 2.5
    assert sum(levels[-100:]) / 100 < 1.2
    assert num_changes(levels) <= 40


def test_staleness_that_no_level_mends_leaves_nothing_skipped() -> None:
    levels = drive(lambda _step, level: 0.6 + 0.1 * level, 200, start=4)
    assert set(levels[30:]) == {0}


def test_inside_the_band_nothing_moves() -> None:
    # Off-policyness 0.4: below 0.5, above 0.35.
    assert set(drive(lambda _step, _level: 0.4, 500, start=4)) == {4}


@pytest.mark.parametrize(("kl", "level"), [(0.25, 5), (0.2500001, 4), (0.5, 4), (0.5000001, 3)])
def test_the_edges_of_the_band_belong_to_the_better_side(kl: float, level: int) -> None:
    settings = ControllerSettings("kl", 0.5, tuple(range(9)), hysteresis=0.5, patience=1)
    state = ControllerState.start(settings, 4)
    assert update(settings, state, {"rollout_corr/kl": kl}).level == level


def test_levels_may_have_gaps_and_a_floor() -> None:
    settings = ControllerSettings("kl", target=0.5, levels=(0, 4, 8), max_wait=16)
    levels = drive(growing(noise=0.0), 300, settings, start=8)
    assert set(levels) == {4, 8}
    assert drive(growing(scale=1.0, noise=0.0), 40, settings, start=8)[:3] == [8, 4, 0]
    assert ControllerState.start(settings, 7).level == 4
    assert ControllerState.start(settings, 3).level == 0


def test_shares_and_the_kl_become_one_measure() -> None:
    found = {"nested/ess": 0.7, "nested/ratio_p05": 0.2, "rollout_corr/kl": -0.01}
    assert off_policyness("ess", found) == pytest.approx(0.3)
    assert off_policyness("ratio_p05", found) == pytest.approx(0.8)
    assert off_policyness("kl", found) == 0.0
    assert off_policyness("ess_seq", found) is None
    assert off_policyness("ess_seq", {"nested/num_non_finite_ratios": 3.0}) == math.inf
    assert off_policyness("kl", {"rollout_corr/kl": math.nan}) is None
    assert ControllerSettings("ess", target=0.6, levels=(0, 1)).limit == pytest.approx(0.4)


def test_a_step_that_tells_nothing_changes_nothing_and_a_broken_one_lowers() -> None:
    state = ControllerState.start(KL, 4)
    assert update(KL, state, {}) == state
    assert update(KL, state, {"nested/num_non_finite_ratios": 5.0}).level == 3
    # Infinity must not stay in a sum: JSON has none.
    assert update(KL, state, {"rollout_corr/kl": math.inf}).total == 0.0


def test_other_settings_keep_the_level_and_forget_the_rest() -> None:
    state = ControllerState(4, "kl", count=2, total=0.4, held=8, failures=((5, 3),), num_changes=9)
    assert ControllerState.from_dict(state.to_dict(), KL) == state
    fewer = ControllerSettings("kl", target=0.5, levels=(0, 3, 6))
    assert ControllerState.from_dict(state.to_dict(), fewer) == ControllerState(
        3, "kl", num_changes=9
    )
    other = ControllerSettings("ess", target=0.5, levels=KL.levels)
    assert ControllerState.from_dict(state.to_dict(), other) == ControllerState(
        4, "ess", num_changes=9
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "psi"}, "unknown metric 'psi'"),
        ({"target": 0.0}, "a target of 0.0 for kl"),
        ({"metric": "ess", "target": 1.0}, "a target of 1.0 for ess"),
        ({"levels": (1, 2)}, "levels ascend from 0"),
        ({"levels": (0, 2, 2)}, "levels ascend from 0"),
        ({"hysteresis": 1.0}, "hysteresis lies between 0 and 1"),
        ({"patience": 9, "max_wait": 8}, "patience <= max_wait"),
    ],
)
def test_settings_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControllerSettings(**({"metric": "kl", "target": 0.5, "levels": (0, 1)} | changes))


@st.composite
def some_settings(draw: st.DrawFn) -> dict[str, Any]:
    patience = draw(st.integers(1, 5))
    levels = draw(st.sets(st.integers(1, 30), min_size=1, max_size=6))
    return {
        "metric": "kl",
        "target": draw(st.floats(0.01, 2.0)),
        "levels": (0, *sorted(levels)),
        "hysteresis": draw(st.floats(0.0, 0.9)),
        "patience": patience,
        "max_wait": draw(st.integers(patience, 40)),
    }


MEASURED = st.one_of(st.floats(-1.0, 5.0), st.sampled_from([math.nan, math.inf, 0.0, 1e300]))


@given(some_settings(), st.integers(0, 40), st.lists(MEASURED, max_size=120))
def test_whatever_is_measured_it_stays_in_bounds(options, start, measured) -> None:
    settings = ControllerSettings(**options)
    state = ControllerState.start(settings, start)
    raises = {level: [-settings.max_wait] for level in settings.levels}
    for step, kl in enumerate(measured):
        before = state
        state = update(settings, state, {"rollout_corr/kl": kl})
        assert state.level in settings.levels
        # One level at a time.
        places = [settings.levels.index(one.level) for one in (before, state)]
        assert abs(places[1] - places[0]) <= 1
        assert state.num_changes - before.num_changes == (places[0] != places[1])
        assert 0 <= state.count < settings.patience
        assert math.isfinite(state.total)
        assert ControllerState.from_dict(json.loads(json.dumps(state.to_dict())), settings) == state
        if places[1] > places[0]:
            # Never before its bar has ended.
            assert step + 1 - raises[state.level][-1] >= settings.patience
            assert before.held + settings.patience >= wait_before(settings, before, state.level)
            raises[state.level].append(step + 1)
        if places[1] < places[0]:
            assert state.num_failures(before.level) >= 1
