"""Layer-skip plans as values, and the laws at the figures that the design names."""

import json
import os
import subprocess
import sys

import pytest

from nested_reft_mcore.algorithm.layer_skip import (
    LayerSkipPlan,
    draw_plan,
    inclusion_probabilities,
    num_skipped_layers,
    predicted_speedup,
)
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule

FOUR_STAGES = [layer // 7 for layer in range(28)]


def test_parts_of_one_layer_become_the_layer():
    both = LayerSkipPlan(12, frozenset({(3, "attention"), (3, "mlp"), (5, "mlp")}))
    assert both == LayerSkipPlan(12, frozenset({(3, "layer"), (5, "mlp")}))
    assert hash(both) == hash(LayerSkipPlan.parse("3,5.mlp", 12))
    redundant = LayerSkipPlan(12, frozenset({(3, "attention"), (3, "layer")}))
    assert redundant == LayerSkipPlan(12, frozenset({(3, "layer")}))


def test_what_runs():
    plan = LayerSkipPlan.parse("1,2.attention,3.mlp", 5)
    assert [plan.skips_attention(i) for i in range(5)] == [False, True, True, False, False]
    assert [plan.skips_mlp(i) for i in range(5)] == [False, True, False, True, False]
    assert [plan.skips_layer(i) for i in range(5)] == [False, True, False, False, False]
    assert plan.active == (0, 2, 3, 4)
    assert plan.num_skipped == 3
    assert plan.skip_ratio == pytest.approx(4 / 10)


def test_full_skips_nothing():
    plan = LayerSkipPlan.full(4)
    assert plan.active == (0, 1, 2, 3)
    assert plan.num_skipped == 0
    assert plan.skip_ratio == 0.0
    assert plan.describe() == "none"


def test_skip_ratio_of_whole_layers_is_their_share():
    assert LayerSkipPlan.parse("1,2,3", 12).skip_ratio == 0.25


@pytest.mark.parametrize("text", ["none", "3", "3,5.attention", "0.mlp,3,11.attention"])
def test_text_and_records_round_trip(text):
    plan = LayerSkipPlan.parse(text, 12)
    assert plan.describe() == text
    assert LayerSkipPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_parse_is_lenient_about_order_and_space():
    assert LayerSkipPlan.parse(" 5.attention, 3 ,5.mlp", 12).describe() == "3,5"
    assert LayerSkipPlan.parse("4.layer", 12).describe() == "4"
    assert LayerSkipPlan.parse("", 12) == LayerSkipPlan.full(12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,x", "cannot read 'x' in the layer list '3,x'.*3,5.attention,7.mlp"),
        ("3,,5", "cannot read ''"),
        ("-1", "cannot read '-1'"),
        ("3-5", "cannot read '3-5'"),
        ("3.ffn", "unknown part 'ffn'.*`5.attention` or `5.mlp`"),
        ("3.", "unknown part ''|cannot read"),
        ("12", "layer 12 does not exist: the model has 12 layers, numbered 0 to 11"),
    ],
)
def test_parse_teaches(text, message):
    with pytest.raises(ValueError, match=message):
        LayerSkipPlan.parse(text, 12)


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="layer 4 does not exist"):
        LayerSkipPlan(4, frozenset({(4, "layer")}))
    with pytest.raises(ValueError, match="layer -1 does not exist"):
        LayerSkipPlan(4, frozenset({(-1, "layer")}))
    with pytest.raises(ValueError, match="at least one layer"):
        LayerSkipPlan.full(0)
    with pytest.raises(ValueError, match="num_layers"):
        LayerSkipPlan.from_dict({"skipped": "3"})


def test_digest_is_pinned_and_tells_plans_apart():
    texts = ["none", "3", "3.attention", "3.mlp", "4", "3,4", "3,4.mlp"]
    digests = [LayerSkipPlan.parse(text, 12).digest() for text in texts]
    assert len(set(digests)) == len(texts)
    assert LayerSkipPlan.parse("3", 13).digest() != digests[1]
    assert LayerSkipPlan.parse("3,5.attention,7.mlp", 12).digest() == PINNED_DIGEST


def test_digest_and_plan_do_not_depend_on_hash_seed():
    """Nor on a version of anything: a run that another one goes on with draws the same plans."""
    program = (
        "from nested_reft_mcore.algorithm.layer_skip import draw_plan\n"
        "for law in ('uniform', 'stage_balanced'):\n"
        "    p = draw_plan(law, 28, 9, 1, [i // 7 for i in range(28)], (3, 4), 'mlp')\n"
        "    print(p.describe(), p.digest())"
    )
    outputs = set()
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        outputs.add(result.stdout)
    assert outputs == {PINNED_PLANS}


@pytest.mark.parametrize(
    ("ratio", "num_layers", "expected"),
    [(0.0, 12, 0), (0.25, 30, 8), (0.15, 30, 5), (0.29, 50, 15), (0.1, 12, 1), (0.04, 12, 0)],
)
def test_num_skipped_layers_rounds_halves_up(ratio, num_layers, expected):
    assert num_skipped_layers(ratio, num_layers) == expected


def test_num_skipped_layers_refuses_a_percentage():
    with pytest.raises(ValueError, match="between 0 and 1, got 15"):
        num_skipped_layers(15, 30)


def test_too_many_layers_says_how_many_are_valid():
    with pytest.raises(
        ValueError, match=r"cannot skip 9 of 12 layers.*border_layers=2.* 8 are valid"
    ):
        draw_plan("uniform", 12, 9, 2, [0] * 12, (0,))
    with pytest.raises(ValueError, match="0 are valid"):
        draw_plan("uniform", 4, 1, 2, [0] * 4, (0,))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="a stage from 0 up for each of 4 layers"):
        draw_plan("uniform", 4, 1, 0, [0, 0, 0], (0,))
    with pytest.raises(ValueError, match="each of 2 stages"):
        draw_plan("uniform", 4, 1, 0, [0, 0, 1, 1], (0,), stage_extra_cost=[1.0])
    with pytest.raises(ValueError, match="border_layers cannot be negative"):
        draw_plan("uniform", 4, 1, -1, [0] * 4, (0,))


def test_speedups_of_the_design():
    """28 layers, 4 stages, 8 skipped: about 1.13x for uniform plans, 1.40x for balanced ones."""
    uniform_plans = [draw_plan("uniform", 28, 8, 1, FOUR_STAGES, (7, i)) for i in range(600)]
    mean = sum(predicted_speedup(plan, FOUR_STAGES) for plan in uniform_plans) / 600
    assert mean == pytest.approx(1.134, abs=0.015)
    for i in range(50):
        plan = draw_plan("stage_balanced", 28, 8, 1, FOUR_STAGES, (7, i))
        assert predicted_speedup(plan, FOUR_STAGES) == pytest.approx(1.40)


def test_virtual_chunks_of_a_rank_are_one_stage():
    interleaved = [0, 0, 1, 1, 0, 0, 1, 1]
    for i in range(50):
        plan = draw_plan("stage_balanced", 8, 4, 0, interleaved, (i,))
        assert sorted(interleaved[layer] for layer, _ in plan.skipped) == [0, 0, 1, 1]


def test_uniform_plans_are_the_same_for_every_layout():
    layouts = [
        [0] * 28,
        FOUR_STAGES,
        [layer // 14 for layer in range(28)],
        [i % 4 for i in range(28)],
    ]
    for step in range(50):
        plans = {draw_plan("uniform", 28, 8, 1, stages, (5, step)) for stages in layouts}
        assert len(plans) == 1


def test_head_and_embedding_draw_skips_to_their_stage():
    stages = [0] * 4 + [1] * 4
    for i in range(20):
        plan = draw_plan("stage_balanced", 8, 2, 0, stages, (i,), stage_extra_cost=[0.0, 2.0])
        assert {stages[layer] for layer, _ in plan.skipped} == {1}
        assert predicted_speedup(plan, stages, [0.0, 2.0]) == pytest.approx(6 / 4)


def test_a_slowest_stage_without_valid_layers_leaves_the_choice_free():
    # The head's stage costs 9 and holds border layers only: every plan has the same maximum.
    stages = [0, 0, 0, 0, 0, 1]
    probabilities = inclusion_probabilities(
        "stage_balanced", 6, 2, 1, stages, stage_extra_cost=[0.0, 8.0]
    )
    assert probabilities == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 0])


def test_everything_skipped_has_infinite_speedup():
    assert predicted_speedup(LayerSkipPlan.parse("0,1", 2), [0, 1]) == float("inf")


def test_schedule_is_a_function_of_seed_and_step():
    schedule = LayerSkipSchedule("stage_balanced", 28, 8, 1, "layer", tuple(FOUR_STAGES), seed=5)
    again = LayerSkipSchedule("stage_balanced", 28, 8, 1, "layer", tuple(FOUR_STAGES), seed=5)
    assert [schedule.plan(s) for s in range(20)] == [again.plan(s) for s in range(20)]
    assert len({schedule.plan(s) for s in range(20)}) == 20
    other_seed = LayerSkipSchedule("stage_balanced", 28, 8, 1, "layer", tuple(FOUR_STAGES), seed=6)
    assert [schedule.plan(s) for s in range(5)] != [other_seed.plan(s) for s in range(5)]
    assert sum(schedule.inclusion_probabilities()) == pytest.approx(8)


PINNED_DIGEST = "2d0a83536ac08256"
PINNED_PLANS = (
    "2.mlp,3.mlp,4.mlp,5.mlp,10.mlp,11.mlp,13.mlp,18.mlp,24.mlp 40150728c5edf644\n"
    "1.mlp,3.mlp,8.mlp,9.mlp,10.mlp,19.mlp,20.mlp,25.mlp,26.mlp 39ac60e651af8e3c\n"
)


@pytest.mark.parametrize("law", ["uniform", "stage_balanced"])
def test_protected_layers_are_never_skipped(law):
    arguments = (law, 8, 3, 1, [i // 4 for i in range(8)])
    for i in range(40):
        plan = draw_plan(*arguments, (i,), protected_layers=(2, 5))
        assert {layer for layer, _ in plan.skipped} <= {1, 3, 4, 6}
    chances = inclusion_probabilities(*arguments, protected_layers=(2, 5))
    assert sum(chances) == pytest.approx(3)
    assert chances[2] == chances[5] == 0
    with pytest.raises(ValueError, match=r"and \[2, 5\] protected 4 are valid"):
        draw_plan(law, 8, 5, 1, [0] * 8, (0,), protected_layers=(2, 5))
    with pytest.raises(ValueError, match="layer 8 does not exist"):
        draw_plan(law, 8, 1, 1, [0] * 8, (0,), protected_layers=(8,))
