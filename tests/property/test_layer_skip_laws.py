"""The two laws of layer-skip plans, for any model, cut and number of skipped layers."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.layer_skip import (
    LayerSkipPlan,
    draw_plan,
    inclusion_probabilities,
    predicted_speedup,
)

LAWS = ("uniform", "stage_balanced")
PARTS = ("layer", "attention", "mlp")


@st.composite
def problems(draw, max_layers=9):
    """(num_layers, num_skipped, border, stages, extra cost) with at least one possible plan."""
    num_layers = draw(st.integers(1, max_layers))
    num_stages = draw(st.integers(1, 3))
    border = draw(st.integers(0, (num_layers - 1) // 2))
    num_skipped = draw(st.integers(0, num_layers - 2 * border))
    stages = draw(
        st.lists(st.integers(0, num_stages - 1), min_size=num_layers, max_size=num_layers)
    )
    costs = st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.5]), min_size=3, max_size=3)
    return num_layers, num_skipped, border, stages, draw(st.none() | costs)


def slowest(layers, part, stages, extra):
    """Cost of the slowest stage, counted from scratch."""
    cost = dict(enumerate(extra or [0.0] * 3))
    for layer, stage in enumerate(stages):
        cost[stage] += 1.0 - (layer in layers) * (1.0 if part == "layer" else 0.5)
    return max(cost.values())


def all_plans(num_layers, num_skipped, border):
    return itertools.combinations(range(border, num_layers - border), num_skipped)


def optimal_plans(num_layers, num_skipped, border, stages, extra, part):
    costs = {
        plan: slowest(plan, part, stages, extra)
        for plan in all_plans(num_layers, num_skipped, border)
    }
    least = min(costs.values())
    return {plan for plan, cost in costs.items() if cost <= least + 1e-9}


@given(problems(40), st.sampled_from(LAWS), st.sampled_from(PARTS), st.integers(0, 2**63 - 1))
def test_exact_number_of_valid_layers(problem, law, part, seed):
    num_layers, num_skipped, border, stages, extra = problem
    plan = draw_plan(law, num_layers, num_skipped, border, stages, (seed, 1), part, extra)
    assert plan.num_skipped == num_skipped
    assert all(border <= layer < num_layers - border for layer, _ in plan.skipped)
    assert all(kind == part for _, kind in plan.skipped)
    assert plan == draw_plan(law, num_layers, num_skipped, border, stages, (seed, 1), part, extra)


@given(problems(), st.sampled_from(PARTS), st.integers(0, 2**63 - 1))
def test_balanced_plans_are_optimal(problem, part, seed):
    num_layers, num_skipped, border, stages, extra = problem
    plan = draw_plan(
        "stage_balanced", num_layers, num_skipped, border, stages, (seed,), part, extra
    )
    drawn = tuple(sorted(layer for layer, _ in plan.skipped))
    assert drawn in optimal_plans(num_layers, num_skipped, border, stages, extra, part)


@given(problems(), st.sampled_from(PARTS), st.sampled_from(LAWS))
def test_inclusion_probabilities_by_enumeration(problem, part, law):
    """Both laws are uniform over their plans: count those that hold each layer."""
    num_layers, num_skipped, border, stages, extra = problem
    if law == "uniform":
        plans = set(all_plans(num_layers, num_skipped, border))
    else:
        plans = optimal_plans(num_layers, num_skipped, border, stages, extra, part)
    counted = [sum(layer in plan for plan in plans) / len(plans) for layer in range(num_layers)]
    got = inclusion_probabilities(law, num_layers, num_skipped, border, stages, part, extra)
    assert got == pytest.approx(counted, abs=1e-12)


@given(problems(60), st.sampled_from(LAWS))
def test_inclusion_probabilities_add_up(problem, law):
    num_layers, num_skipped, border, stages, extra = problem
    got = inclusion_probabilities(law, num_layers, num_skipped, border, stages, "layer", extra)
    assert sum(got) == pytest.approx(num_skipped)
    assert all(0 <= p <= 1 for p in got)


CASES = [
    ("uniform", 6, 3, 0, [0, 0, 0, 1, 1, 1], None),
    ("stage_balanced", 8, 3, 1, [0, 0, 0, 0, 1, 1, 1, 1], None),
    ("stage_balanced", 8, 3, 0, [0, 0, 0, 1, 1, 1, 2, 2], [0.5, 0.0, 1.0]),
]


@pytest.mark.parametrize("case", CASES)
def test_every_plan_of_the_law_is_equally_likely(case):
    law, num_layers, num_skipped, border, stages, extra = case
    plans = set(all_plans(num_layers, num_skipped, border))
    if law == "stage_balanced":
        plans = optimal_plans(num_layers, num_skipped, border, stages, extra, "layer")
    num_draws = 60 * len(plans)
    drawn = Counter(
        tuple(
            sorted(
                layer
                for layer, _ in draw_plan(
                    law, num_layers, num_skipped, border, stages, (1, i), "layer", extra
                ).skipped
            )
        )
        for i in range(num_draws)
    )
    assert set(drawn) == plans
    statistic = sum((drawn[plan] - 60) ** 2 / 60 for plan in plans)
    freedom = len(plans) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    probabilities = inclusion_probabilities(
        law, num_layers, num_skipped, border, stages, "layer", extra
    )
    for layer, probability in enumerate(probabilities):
        frequency = sum(n for plan, n in drawn.items() if layer in plan) / num_draws
        deviation = math.sqrt(probability * (1 - probability) / num_draws)
        assert abs(frequency - probability) <= 5 * deviation


@given(problems(30), st.sampled_from(PARTS), st.integers(0, 2**32))
def test_predicted_speedup_counts_stage_costs(problem, part, seed):
    num_layers, num_skipped, border, stages, extra = problem
    plan = draw_plan("uniform", num_layers, num_skipped, border, stages, (seed,), part, extra)
    layers = {layer for layer, _ in plan.skipped}
    remaining = slowest(layers, part, stages, extra)
    if remaining > 0:
        full = slowest((), part, stages, extra)
        assert predicted_speedup(plan, stages, extra) == pytest.approx(full / remaining)


@settings(max_examples=50)
@given(
    st.integers(1, 20).flatmap(
        lambda n: st.tuples(
            st.just(n), st.sets(st.tuples(st.integers(0, n - 1), st.sampled_from(PARTS)))
        )
    )
)
def test_plans_survive_text(case):
    num_layers, skipped = case
    plan = LayerSkipPlan(num_layers, frozenset(skipped))
    assert LayerSkipPlan.parse(plan.describe(), num_layers) == plan
    for layer in range(num_layers):
        attention = bool({(layer, "layer"), (layer, "attention")} & skipped)
        mlp = bool({(layer, "layer"), (layer, "mlp")} & skipped)
        assert plan.skips_attention(layer) == attention
        assert plan.skips_mlp(layer) == mlp
        assert plan.skips_layer(layer) == (attention and mlp)
        assert (layer in plan.active) == (not (attention and mlp))
