"""What skipping can gain at most, and which plans are compared."""

import pytest

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.bench.cases import FULL, all_key, make_cases
from nested_reft_mcore.bench.ceiling import kv_formula_bytes, skipped_share, speedup_ceiling
from nested_reft_mcore.bench.hardware import Machine, step_bound
from nested_reft_mcore.bench.rounds import run_rounds
from nested_reft_mcore.config.bench import BenchRolloutOptions


def test_ceiling_is_the_time_without_the_skipped_share():
    # 10 s, of which 8 are layers: a quarter of them leaves 8 s, all of them leave 2.
    assert speedup_ceiling(10.0, 2.0, 0.25) == pytest.approx(10 / 8)
    assert speedup_ceiling(10.0, 2.0, 1.0) == pytest.approx(5.0)
    assert speedup_ceiling(10.0, 2.0, 0.0) == 1.0


def test_ceiling_is_one_where_skipping_everything_saves_nothing():
    assert speedup_ceiling(10.0, 10.5, 0.5) == 1.0


@pytest.mark.parametrize(("full", "least", "share"), [(0, 1, 0.1), (1, 0, 0.1), (1, 1, 1.1)])
def test_ceiling_of_impossible_numbers(full: float, least: float, share: float):
    with pytest.raises(ValueError, match="found"):
        speedup_ceiling(full, least, share)


def test_skipped_share_is_that_of_the_fullest_stage():
    one_stage, two_stages = (0,) * 8, (0, 0, 0, 0, 1, 1, 1, 1)
    plan = LayerSkipPlan.parse("1,2,5", 8)
    assert skipped_share(plan, one_stage, "layer") == pytest.approx(3 / 8)
    assert skipped_share(plan, two_stages, "layer") == pytest.approx(1 / 4)
    assert skipped_share(LayerSkipPlan.parse("1,2", 8), two_stages, "layer") == 0


def test_skipped_share_of_parts():
    plan = LayerSkipPlan.parse("1.attention,2.attention,3.mlp,4", 8)
    stages = (0,) * 8
    assert skipped_share(plan, stages, "attention") == pytest.approx(3 / 8)
    assert skipped_share(plan, stages, "mlp") == pytest.approx(2 / 8)
    assert skipped_share(plan, stages, "layer") == pytest.approx(1 / 8)


def test_kv_formula_counts_active_attentions_by_stage():
    plan = LayerSkipPlan.parse("0,2.attention,3.mlp", 4)
    # Keys and values, 3 slots, 10 positions, 2 groups of 8, 4 bytes.
    layer = 2 * 3 * 10 * 2 * 8 * 4
    assert kv_formula_bytes(plan, (0, 0, 1, 1), 3, 10, 2, 8, 4) == (layer, layer)


def test_step_bound_is_the_larger_of_reading_and_arithmetic():
    machine = Machine(peak_flops=100.0, read_bandwidth=10.0)
    few, many = step_bound(50, 200, 1, machine), step_bound(50, 200, 64, machine)
    assert (few.weight_seconds, few.arithmetic_seconds) == (20.0, 1.0)
    assert few.seconds == 20.0
    assert many.seconds == many.arithmetic_seconds == 64.0


def test_cases_are_full_depth_then_each_number_of_layers_then_all():
    options = BenchRolloutOptions(skip="0,5,10,25,50", parts="layer,mlp")
    cases = {case.key: case for case in make_cases(options, 12, (0,) * 12)}
    keys = ["1 layer", "3 layer", "6 layer", all_key("layer")]
    keys += [key.replace("layer", "mlp") for key in keys]
    assert list(cases) == [FULL, *keys]
    # 0.6 and 1.2 layers are one and the same case.
    assert cases["1 layer"].percentages == (5.0, 10.0)
    assert cases["6 layer"].plan.num_skipped == 6
    assert cases[all_key("layer")].plan.active == ()
    assert all(cases[all_key("mlp")].plan.skips_mlp(layer) for layer in range(12))
    assert not cases[all_key("mlp")].plan.skips_attention(5)


def test_plans_keep_the_layers_at_either_end():
    options = BenchRolloutOptions(skip="66.7", parts="layer", border_layers=2)
    _, most, _ = make_cases(options, 12, (0,) * 12)
    assert most.plan.active == (0, 1, 10, 11)


def test_without_a_share_nothing_but_full_depth_is_run():
    cases = make_cases(BenchRolloutOptions(skip="0"), 12, (0,) * 12)
    assert [case.key for case in cases] == [FULL]


def test_rounds_take_turns_and_turn_round():
    order: list[str] = []

    def case(name: str) -> int:
        order.append(name)
        return len(order)

    counts: list[int] = []
    found = run_rounds({"a": lambda: case("a"), "b": lambda: case("b")}, 3, counts.append)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert counts == [1, 2, 3, 4, 5, 6]
