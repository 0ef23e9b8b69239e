"""What the controller may choose from, and how a run is steered by it."""

import json
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_config_checks import config, refusal

from nested_reft_mcore.algorithm.diagnostics import MetricSums, MetricTerms
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ControllerConfig
from nested_reft_mcore.training.ratio_split import explain_engine_noise
from nested_reft_mcore.training.steering import SkipSteering, skip_levels
from nested_reft_mcore.training.trainer import _check_engine_noise
from nested_reft_mcore.training.update import UpdateResult

CONTROLLER = ControllerConfig(metric="kl", target=0.5, patience=1, max_wait=8)


def schedule(
    law: str = "stage_balanced",
    stages: int = 1,
    head_cost: float = 0.0,
    num_skipped: int = 2,
    protected: tuple[int, ...] = (),
) -> LayerSkipSchedule:
    return LayerSkipSchedule(
        law=law,
        num_layers=12,
        num_skipped=num_skipped,
        border_layers=1,
        part="layer",
        stage_of_layer=tuple(layer // (12 // stages) for layer in range(12)),
        seed=1,
        stage_extra_cost=(*[0.0] * (stages - 1), head_cost),
        protected_layers=protected,
    )


@pytest.mark.parametrize(
    ("made", "bounds", "levels"),
    [
        (schedule(), (0, None), tuple(range(11))),
        (schedule("uniform", stages=4), (2, 5), (0, 2, 3, 4, 5)),
        # Only when all four stages have one layer less is there anything gained; the first and last
        # stage have two valid layers.
        (schedule(stages=4), (0, None), (0, 4, 8)),
        (schedule(stages=4), (5, None), (0, 8)),
        # A head of two layers: two skips on the last stage alone pay, then one on each.
        (schedule(stages=4, head_cost=2.0), (0, None), (0, 1, 2)),
        (schedule(stages=2, head_cost=2.0), (0, None), (0, 1, 2, 4, 6, 8)),
        # Of ten between the borders two are protected; the border's own protection counts once.
        (schedule("uniform", protected=(0, 3, 7)), (5, None), (0, 5, 6, 7, 8)),
        (schedule(protected=(0, 3, 7)), (5, 99), (0, 5, 6, 7, 8)),
    ],
)
def test_only_numbers_that_make_generation_faster_are_levels(made, bounds, levels) -> None:
    assert skip_levels(made, *bounds) == levels


def test_no_level_at_all_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"from min_skipped=0 to max_skipped=3 .* those that do: n"):
        skip_levels(schedule(stages=4), 0, 3)


def test_the_plan_follows_the_level_and_a_resumed_run_goes_on_alike() -> None:
    made = schedule()
    steering, resumed = (SkipSteering(CONTROLLER, made, {}) for _ in range(2))
    sizes = []
    for step in range(40):
        plan = steering.plan(step)
        assert plan == resumed.plan(step) == made.plan(step, plan.num_skipped)
        sizes.append(plan.num_skipped)
        # Six layers are too many.
        metrics = {"rollout_corr/kl": 0.1 * plan.num_skipped}
        assert steering.learn(metrics) == resumed.learn(metrics)
        saved = json.loads(json.dumps(steering.state_dict()))
        resumed = SkipSteering(CONTROLLER, made, saved)
    assert sizes[0] == 2
    # Below 0.7 * 0.5 there is room for one more.
    assert set(sizes[3:]) == {4}


def test_metrics_say_what_comes_next_and_when() -> None:
    steering = SkipSteering(CONTROLLER, schedule(), {})
    assert steering.learn({"rollout_corr/kl": 9.0}) == {
        "controller/off_policyness": 9.0,
        "controller/limit": 0.5,
        "controller/next_num_skipped": 1.0,
        "controller/steps_before_raise": 2.0,
        "controller/num_changes": 1.0,
    }
    assert steering.learn({})["controller/next_num_skipped"] == 1.0


def test_the_wait_that_is_told_is_the_one_that_is_kept() -> None:
    steering = SkipSteering(CONTROLLER, schedule(), {})
    raises, told = [], []
    for step in range(100):
        number = steering.plan(step).num_skipped
        # Two are too many, and one is well below the limit.
        found = steering.learn({"rollout_corr/kl": 0.1 if number < 2 else 9.0})
        told.append(found["controller/steps_before_raise"])
        if number < 2 and found["controller/next_num_skipped"] == 2:
            raises.append(step)
            assert number == 1
    # It counts down to the step before the raise.
    for before, after in pairwise(raises):
        wait = after - before - 1
        assert told[before + 1 : after] == list(range(wait, 0, -1))
    assert [after - before - 1 for before, after in pairwise(raises)][:3] == [4, 8, 8]


def test_without_a_controller_nothing_is_steered() -> None:
    made = schedule()
    steering = SkipSteering(ControllerConfig(), made, {})
    assert steering.learn({"rollout_corr/kl": 9.0}) == {}
    assert steering.state_dict() == {}
    assert [steering.plan(step) for step in range(9)] == [made.plan(step) for step in range(9)]


@pytest.mark.parametrize(
    ("controller", "rollout", "message"),
    [
        ({"metric": "kl"}, {}, "metric=kl needs controller.target"),
        ({"target": 0.5}, {}, "controller.target=0.5 is set, but controller.metric=none"),
        ({"metric": "ess", "target": 1.5}, {}, "ess is a share"),
        ({"min_skipped": 3, "max_skipped": 2}, {}, "min_skipped=3 is above"),
        ({"patience": 9, "max_wait": 8}, {}, "patience=9 is above"),
        (
            {"max_skipped": 11},
            {},
            "controller: 11 layers to skip.* nested.border_layers=1 leave 10",
        ),
        ({"metric": "kl", "target": 1.5}, {"mode": "full"}, "expected rollout.mode=nested"),
        ({"metric": "kl", "target": 1.5}, {"replay": "x"}, "with rollout.replay"),
    ],
)
def test_controllers_that_are_refused(controller, rollout, message) -> None:
    assert re.search(message, refusal(config(controller=controller, rollout=rollout)))


def test_engine_noise_is_explained_beyond_rounding_only() -> None:
    assert explain_engine_noise(9e-7, "float32") is None
    assert explain_engine_noise(9e-3, "bfloat16") is None
    for k3_kl, dtype in ((2e-6, "float32"), (-2e-6, "float32"), (2e-2, "bfloat16")):
        message = explain_engine_noise(k3_kl, dtype)
        assert message is not None
        assert f"{k3_kl:.3g} nats" in message
    assert explain_engine_noise(float("nan"), "float32") is not None


@pytest.mark.parametrize(
    ("plan", "replay", "metrics", "warns"),
    [
        ("none", None, {"rollout_corr/k3_kl": 1e-3}, True),
        ("none", None, {"rollout_corr/k3_kl": 1e-8}, False),
        ("3", None, {"rollout_corr/k3_kl": 1e-3}, False),
        # Another run's weights made them.
        ("none", "other", {"rollout_corr/k3_kl": 1e-3}, False),
        # What is not finite is in no mean, and where nothing is there is no mean.
        ("none", None, {"rollout_corr/k3_kl": 1e-8, "nested/num_non_finite_ratios": 1.0}, True),
        ("none", None, {"nested/num_non_finite_ratios": 9.0}, True),
    ],
)
def test_a_run_warns_of_an_engine_that_disagrees(plan, replay, metrics, warns, caplog) -> None:
    run = SimpleNamespace(
        config=config(rollout={"replay": replay}), context=SimpleNamespace(is_main=True)
    )
    nothing = MetricTerms(MetricSums({}, {}), {}, torch.zeros(0))
    first = UpdateResult(True, nothing, metrics, torch.zeros(1, 1))
    _check_engine_noise(cast(Any, run), LayerSkipPlan.parse(plan, 12), first)
    assert ("every importance ratio is off by that" in caplog.text) == warns
