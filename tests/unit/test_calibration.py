"""Calibration gives back what timings were made with, and says what they do not tell."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from calibration_cases import SIZES, START, TRUTH, made_run, overrides, study

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.planning.calibration import Calibration, calibrate
from nested_reft_mcore.planning.calibration_check import check, predicted_seconds
from nested_reft_mcore.planning.calibration_points import (
    Point,
    points_of,
    split_by_name,
    split_half,
)
from nested_reft_mcore.planning.calibration_report import (
    calibration_table,
    check_record,
    check_tables,
    remarks_of,
)
from nested_reft_mcore.planning.hardware import HardwareProfile, load_hardware
from nested_reft_mcore.planning.hardware_file import profile_yaml
from nested_reft_mcore.planning.least_squares import least_squares
from nested_reft_mcore.planning.measured_run import PARTS, Average, MeasuredRun, TimedStep

NOISE = 0.02


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    return study(NOISE)


@pytest.fixture(scope="module")
def made(runs: list[MeasuredRun]) -> Calibration:
    return calibrate(runs, START, "fitted")


def test_it_recovers_what_the_timings_tell(made: Calibration):
    told = [value for value in made.values if value.is_told]
    names = {value.name for value in told}
    wanted = {"decode_matmul_efficiency", "layer_overhead_us", "update_layer_overhead_us"}
    assert wanted | {"matmul_efficiency", "pass_overhead_us"} <= names
    for value in told:
        truth = getattr(TRUTH.assumptions, value.name, None) or getattr(TRUTH, value.name)
        off = abs(math.log(value.after / truth))
        # Of so many values one may lie three deviations away.
        assert off <= 3.5 * math.log(value.factor) + 0.02, value


def test_what_is_not_told_stays_and_is_said(made: Calibration):
    by_name = {value.name: value for value in made.values}
    # Nothing here is large enough for memory to be what decoding waits for.
    untold = by_name["decode_efficiency"]
    assert not untold.is_told
    assert untold.after == pytest.approx(untold.before, rel=0.05)
    assert "hardly told" in calibration_table(made)
    assert remarks_of(made)["pass_overhead_us"].startswith("fitted, within a factor")
    # Without tensor parallelism no run tells anything of all-reduces.
    assert "all_reduce_latency_us" not in by_name
    assert made.profile.assumptions.all_reduce_latency_us == 12.0


def test_a_half_predicts_the_other(runs: list[MeasuredRun]):
    points = points_of(runs)
    kept, held = split_half(points)
    assert not {p.name for p in kept} & {p.name for p in held}
    assert len(kept) + len(held) == len(runs)
    fitted = calibrate([run for point in kept for run in point.runs], START, "half").profile
    found = check(held, kept, partial(predicted_seconds, fitted))
    assert found.median_error < 0.03
    assert abs(found.worst.error) < 0.12
    assert found.count("layout", "right") > 0
    assert found.count("layout", "wrong") == 0
    untouched = check(held, kept, partial(predicted_seconds, START))
    assert untouched.median_error > 0.3
    text = check_tables("plan", found)
    assert all(point.name in text for point in held)
    assert len(check_record(found)["points"]) == len(held)


def test_sizes_held_out_are_predicted(runs: list[MeasuredRun]):
    kept, held = split_by_name(points_of(runs), [f"{SIZES[-1][0]}.*"])
    assert {point.name.split(".")[0] for point in held} == {str(SIZES[-1][0])}
    fitted = calibrate([run for point in kept for run in point.runs], START, "sizes").profile
    found = check(held, kept, partial(predicted_seconds, fitted))
    assert found.median_error < 0.1
    with pytest.raises(UserError, match=r"--hold-out 9B\*"):
        split_by_name(points_of(runs), ["9B*"])


def test_a_wrong_ranking_is_counted_as_wrong(runs: list[MeasuredRun]):
    """Predicted backwards, what is right becomes wrong; what is noise does not."""
    points = points_of(runs)

    def backward(point: Point, average: Average) -> dict[str, float]:
        total = math.fsum(predicted_seconds(TRUTH, point, average).values())
        return dict.fromkeys(PARTS, 0.0) | {"update": 1 / total}

    right, wrong = check(points, [], partial(predicted_seconds, TRUTH)), check(points, [], backward)
    assert right.count("layout", "right") > 3
    assert right.count("layout", "wrong") == 0
    for what in ("layout", "law"):
        assert right.count(what, "right") == wrong.count(what, "wrong")
        assert wrong.count(what, "right") == 0


def test_laws_are_ranked_by_mean_steps():
    """Of two skipped layers most random plans take one from each stage: the median step is even."""
    laws = ("stage_balanced", "uniform")
    options = {law: overrides(SIZES[2], 2, 2, law, 0) for law in laws}
    runs = [made_run(law, *options[law], noise=0.002, num_steps=33) for law in laws]
    found = check(points_of(runs), [], partial(predicted_seconds, TRUTH))
    balanced, uniform = found.rows
    assert uniform.predicted_step == pytest.approx(balanced.predicted_step, rel=1e-3)
    (ranking,) = found.rankings
    assert (ranking.what, ranking.verdict) == ("law", "right")
    assert ranking.measured == pytest.approx(ranking.predicted, rel=0.01)
    assert ranking.predicted > 1.01
    together = found.laws_together()
    assert together is not None
    assert (together.measured, together.predicted) == (ranking.measured, ranking.predicted)
    assert together.noise == ranking.noise > 0
    assert "uniform steps are 1.0" in check_tables("plan", found)


def law_pair(seed: int, factor: float = 1.0) -> list[MeasuredRun]:
    """A run of each law; the machine makes everything of the uniform one `factor` times as long."""
    runs = []
    for law in ("stage_balanced", "uniform"):
        options = overrides(SIZES[2], 2, 2, law, seed)
        run = made_run(f"{law}.seed_{seed}", *options, noise=0.002, num_steps=17)
        slow = factor if law == "uniform" else 1.0
        runs.append(replace(run, steps=tuple(slowed(step, slow) for step in run.steps)))
    return runs


def slowed(step: TimedStep, factor: float) -> TimedStep:
    return replace(step, seconds={part: factor * s for part, s in step.seconds.items()})


def test_drift_between_runs_is_no_difference():
    """All of a run is slower, its updates too, which skip nothing: that says nothing of its law."""
    runs = [*law_pair(0, 1.1), *law_pair(1, 1.1)]
    found = check(points_of(runs), [], partial(predicted_seconds, TRUTH))
    assert found.drift == pytest.approx(math.log(1.1) / math.sqrt(2), rel=0.1)
    (ranking,) = found.rankings
    assert ranking.measured > 1.1
    assert ranking.updates == pytest.approx(1.1, rel=0.01)
    assert ranking.verdict == "indistinguishable"
    text = check_tables("plan", found)
    assert "drift between runs (6.7% a run" in text or "drift between runs (6.8% a run" in text
    assert "which skip nothing, are 1.10" in text


def test_a_machine_that_drifts_between_seeds_is_no_noise_within_them():
    slow = [replace(run, steps=tuple(slowed(s, 1.5) for s in run.steps)) for run in law_pair(1)]
    found = check(points_of([*law_pair(0), *slow]), [], partial(predicted_seconds, TRUTH))
    assert found.drift is not None
    assert found.drift < 0.005
    assert [ranking.verdict for ranking in found.rankings] == ["right"]


def test_drift_that_nothing_tells_is_said():
    runs = [made_run(f"pp{n}", *overrides(SIZES[0], n, 0, "uniform", 0)) for n in (1, 2)]
    found = check(points_of(runs), [], partial(predicted_seconds, TRUTH))
    assert found.drift is None
    assert "nothing tells the drift between runs" in check_tables("plan", found)


def test_a_difference_that_one_of_both_shows_is_neither_right_nor_wrong():
    pair = points_of([*law_pair(0), *law_pair(1)])

    def flat(point: Point, average: Average) -> dict[str, float]:
        return {part: 1.0 for part in PARTS}

    found = check(pair, [], flat)
    (ranking,) = found.rankings
    assert (ranking.verdict, ranking.predicted) == ("missed", 1.0)
    assert f"one apart, the other not: {ranking.other} takes" in check_tables("plan", found)


def test_pairs_have_one_batch_and_can_differ():
    one = made_run("one", *overrides(SIZES[0], 1, 3, "uniform", 0))
    shorter = "rollout.max_new_tokens=8"
    other = made_run("other", *overrides(SIZES[0], 2, 3, "uniform", 0), shorter)
    found = check(points_of([one, other]), [], partial(predicted_seconds, TRUTH))
    assert found.rankings == ()
    # One layer of two equal stages: whichever it is, one stage is a layer shorter.
    laws = ("stage_balanced", "uniform")
    alike = [made_run(law, *overrides(SIZES[0], 2, 1, law, 0)) for law in laws]
    found = check(points_of(alike), [], partial(predicted_seconds, TRUTH))
    assert (found.rankings, found.alike) == ((), (laws,))
    assert "not counted: uniform and stage_balanced: all plans leave" in check_tables("p", found)


def test_the_largest_error_is_in_percent():
    """By logarithms 18% too little is more than 20% too much."""
    points = points_of(made_run(f"pp{n}", *overrides(SIZES[0], n, 0, "uniform", 0)) for n in (1, 2))
    factors = dict(zip((point.name for point in points), (0.82, 1.2), strict=True))

    def off(point: Point, average: Average) -> dict[str, float]:
        return {part: factors[point.name] * s for part, s in point.seconds.items()}

    found = check(points, [], off)
    assert found.worst.error == pytest.approx(0.2, abs=0.01)


def test_runs_that_differ_in_the_seed_are_one_point():
    options = [overrides(SIZES[0], 2, 3, "uniform", seed) for seed in (0, 1)]
    pair = [made_run(f"a.seed_{n}", *given) for n, given in enumerate(options)]
    other = made_run("b.seed_0", *overrides(SIZES[0], 1, 3, "uniform", 0))
    points = points_of([pair[0], other, pair[1]])
    assert [(point.name, len(point.runs)) for point in points] == [("b.seed_0", 1), ("a", 2)]


def test_a_profile_is_read_back_as_it_was_written(made: Calibration, tmp_path: Path):
    path = tmp_path / "fitted.yaml"
    path.write_text(profile_yaml(made.profile, remarks_of(made), "of a test"))
    read = load_hardware(str(path))
    assert read.name == "fitted"
    assert read.product_shares == made.profile.product_shares
    for name in HardwareProfile.model_fields:
        value = getattr(made.profile, name)
        if isinstance(value, float):
            assert getattr(read, name) == pytest.approx(value, rel=1e-3)


def test_mistakes_are_named():
    options = overrides(SIZES[0], 1, 3, "uniform", 0)
    one = made_run("one", *options)
    with pytest.raises(UserError, match="expected 2 or more"):
        calibrate([one], START, "x")
    with pytest.raises(UserError, match="short: has fewer than two steps"):
        made_run("short", *options, num_steps=1)
    with pytest.raises(UserError, match=r"lossless: rollout\.mode=speculative"):
        made_run("lossless", *options, "rollout.mode=speculative")
    with pytest.raises(UserError, match=r"timing_s/step is 0"):
        made_run("broken", *options, changes={"timing_s/step": 0})


def test_least_squares_finds_the_minimum_and_respects_bounds():
    matrix = np.asarray([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]])
    target = np.asarray([1.0, 2.0, 3.0])
    exact = np.linalg.lstsq(matrix, target, rcond=None)[0]
    wide, start = np.full(2, 10.0), np.zeros(2)
    free = least_squares(lambda x: matrix @ x - target, start, -wide, wide)
    assert free.values == pytest.approx(exact, abs=1e-4)
    spread = np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)))
    assert free.deviations == pytest.approx(spread, rel=1e-3)
    upper = np.asarray([10.0, exact[1] - 0.3])
    bound = least_squares(lambda x: matrix @ x - target, start, -wide, upper)
    assert bound.values[1] == pytest.approx(upper[1])
    # The best first value for a second one that is stuck.
    column, rest = matrix[:, 0], target - matrix[:, 1] * upper[1]
    assert bound.values[0] == pytest.approx(column @ rest / (column @ column), abs=1e-3)
    with pytest.raises(ValueError, match="within the bounds"):
        least_squares(lambda x: x, np.full(2, 11.0), -wide, wide)
