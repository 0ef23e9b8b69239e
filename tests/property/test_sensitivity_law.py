"""The plan law `sensitivity` against a list of all plans of small models."""

import math
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.counter_random import Stream
from nested_reft_mcore.algorithm.kl_interaction import KlInteraction
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, draw_plan
from nested_reft_mcore.algorithm.sensitivity import (
    KL_UNITS,
    TIME_UNITS,
    SensitivityLaw,
    SkipOption,
)
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule

LAYER_TICKS = 100
GOLDEN = "2.attention,3.attention,4.attention,5.attention,8.attention,10.attention,11.attention"
GOLDEN_NUM_PLANS = 148


@st.composite
def laws(draw):
    """Arguments of a law whose KLs and times are whole units, so that nothing is rounded.

    A second is a unit of time: the slowest stage takes TIME_UNITS of them.
    """
    num_layers = draw(st.integers(1, 5))
    num_stages = draw(st.integers(1, min(3, num_layers)))
    stages = tuple(layer * num_stages // num_layers for layer in range(num_layers))
    slack = [draw(st.integers(0, 400)) for _ in range(num_stages)]
    slack[draw(st.integers(0, num_stages - 1))] = 0
    extra = tuple(
        float(TIME_UNITS - LAYER_TICKS * stages.count(stage) - slack[stage])
        for stage in range(num_stages)
    )
    kl = st.integers(0, KL_UNITS + 60)
    options = []
    for layer in range(num_layers):
        attention = draw(st.integers(20, 80))
        seconds = {"attention": attention, "mlp": 100 - attention, "layer": 100}
        for part in draw(st.sets(st.sampled_from(sorted(seconds)))):
            options.append(SkipOption(layer, part, float(draw(kl)), float(seconds[part])))
    return {
        "num_layers": num_layers,
        "options": tuple(options),
        "layer_seconds": float(LAYER_TICKS),
        "stage_of_layer": stages,
        "kl_budget": float(KL_UNITS),
        "stage_extra_seconds": extra,
        "border_layers": draw(st.integers(0, 1)),
        "protected_layers": tuple(
            sorted(draw(st.sets(st.integers(0, num_layers - 1), max_size=1)))
        ),
        "saving_tolerance": draw(st.sampled_from([0.0, 0.1, 0.5])),
    }


def pool_of(arguments):
    border, num_layers = arguments["border_layers"], arguments["num_layers"]
    return [
        option
        for option in arguments["options"]
        if border <= option.layer < num_layers - border
        and option.layer not in arguments["protected_layers"]
        and option.kl <= KL_UNITS
    ]


def all_plans(arguments):
    """Every plan within the budget, as a tuple of options: the definition, not the algorithm."""
    by_layer = {}
    for option in pool_of(arguments):
        by_layer.setdefault(option.layer, [None]).append(option)
    for chosen in product(*by_layer.values()):
        options = tuple(option for option in chosen if option is not None)
        if sum(option.kl for option in options) <= KL_UNITS:
            yield options


def stage_times(arguments, options=()):
    stages = arguments["stage_of_layer"]
    times = [
        LAYER_TICKS * stages.count(stage) + extra
        for stage, extra in enumerate(arguments["stage_extra_seconds"])
    ]
    for option in options:
        times[stages[option.layer]] -= option.seconds
    return times


def expected_plans(arguments):
    """Plans that are nearly as fast as the fastest and waste nothing; none if nothing is gained."""
    plans = list(all_plans(arguments))
    full = stage_times(arguments)
    best = min(max(stage_times(arguments, options)) for options in plans)
    if best >= TIME_UNITS:
        return []
    allowed = best + arguments["saving_tolerance"] * (TIME_UNITS - best)
    kept = []
    for options in plans:
        times = stage_times(arguments, options)
        fits = all(time <= allowed + 1e-6 for time in times)
        for stage, time in enumerate(full):
            saved = time - times[stage]
            need = max(0.0, time - best)
            own = [o for o in pool_of(arguments) if arguments["stage_of_layer"][o.layer] == stage]
            largest = max((option.seconds for option in own), default=0.0)
            fits = fits and (saved == 0 if need == 0 else saved < need + largest)
        if fits:
            kept.append(options)
    return kept


def as_plan(arguments, options):
    """Attention and MLP of a layer are never both chosen: the whole layer is measured by itself."""
    skipped = frozenset((option.layer, option.part) for option in options)
    return LayerSkipPlan(arguments["num_layers"], skipped)


@given(laws())
@settings(max_examples=70)
def test_all_plans_of_the_law_and_no_others(arguments):
    expected = expected_plans(arguments)
    if not expected:
        with pytest.raises(ValueError, match="KL budget of 512"):
            SensitivityLaw(**arguments)
        return
    law = SensitivityLaw(**arguments)
    assert law.num_plans == len(expected)
    # Exact inclusion probabilities: shares of the plans that there are.
    counts = Counter((option.layer, option.part) for options in expected for option in options)
    for entry, probability in law.part_probabilities().items():
        assert probability == pytest.approx(counts[entry] / len(expected), abs=1e-12)
    by_layer = law.inclusion_probabilities()
    for layer in range(arguments["num_layers"]):
        skipping = sum(any(o.layer == layer for o in options) for options in expected)
        assert by_layer[layer] == pytest.approx(skipping / len(expected), abs=1e-12)
    allowed = {as_plan(arguments, options) for options in expected}
    fastest = min(max(stage_times(arguments, options)) for options in all_plans(arguments))
    for draw in range(4):
        plan = law.draw((3, draw))
        assert plan in allowed
        assert law.predicted_kl(plan) <= KL_UNITS * (1 + 1e-9)
        skipped = [o for o in arguments["options"] if (o.layer, o.part) in plan.skipped]
        assert law.stage_seconds(plan) == pytest.approx(stage_times(arguments, skipped))
        # No plan of the budget, balanced or not, is faster by more than the tolerance allows.
        slowest = max(law.stage_seconds(plan))
        assert (
            TIME_UNITS - slowest
            >= (1 - arguments["saving_tolerance"]) * (TIME_UNITS - fastest) - 1e-6
        )
        border = arguments["border_layers"]
        for layer, _ in plan.skipped:
            assert border <= layer < arguments["num_layers"] - border
            assert layer not in arguments["protected_layers"]
        assert plan == SensitivityLaw(**arguments).draw((3, draw))


@given(st.integers(0, 2**31), st.floats(0.05, 2.0), st.floats(0.7, 2.0), st.floats(0.02, 1.0))
@settings(max_examples=25)
def test_real_numbers_stay_within_the_budget(seed, scale, exponent, budget):
    """KLs that are no whole units, and an interaction: the predicted KL is within the budget."""
    options = [
        SkipOption(
            layer, part, 0.003 + 0.05 * ((seed * (layer + 1) * 7919 + place) % 97) / 97, time
        )
        for layer in range(8)
        for place, (part, time) in enumerate((("attention", 0.37), ("mlp", 0.63), ("layer", 1.0)))
    ]
    interaction = KlInteraction(scale, exponent)
    stages = (0, 0, 0, 0, 1, 1, 1, 1)
    arguments = (8, tuple(options), 1.0, stages, budget, interaction, (0.0, 0.4))
    cheapest = min(option.kl for option in options if option.layer >= 4)
    if interaction.predict(cheapest) > budget:
        # Not even the cheapest part of the slowest stage fits.
        with pytest.raises(ValueError, match="KL budget"):
            SensitivityLaw(*arguments)
        return
    law = SensitivityLaw(*arguments)
    for draw in range(5):
        plan = law.draw((seed, draw))
        assert plan.skipped
        own = {(option.layer, option.part): option.kl for option in options}
        total = sum(own[entry] for entry in plan.skipped)
        assert interaction.predict(total) <= budget * (1 + 1e-9)
        assert law.predicted_kl(plan) == pytest.approx(interaction.predict(total))


def real_sized_law(stages=(0,) * 12, **changes) -> SensitivityLaw:
    """Twelve layers whose attention is cheap and whose first and seventh layers are dear."""
    options = []
    for layer in range(12):
        dear = 20.0 if layer in (0, 7) else 1.0 + 0.1 * layer
        options += [
            SkipOption(layer, "attention", 0.02 * dear, 0.5),
            SkipOption(layer, "mlp", 0.05 * dear, 0.5),
            SkipOption(layer, "layer", 0.09 * dear, 1.0),
        ]
    arguments = {"kl_budget": 0.25, "interaction": KlInteraction(1.1, 1.05)} | changes
    return SensitivityLaw(12, tuple(options), 1.0, tuple(stages), **arguments)


def test_frequencies_are_the_inclusion_probabilities():
    law = real_sized_law(border_layers=1)
    num_draws = 2000
    counts = Counter(entry for draw in range(num_draws) for entry in law.draw((11, draw)).skipped)
    probabilities = law.part_probabilities()
    assert sum(probabilities.values()) > 3
    for entry, probability in probabilities.items():
        error = math.sqrt(probability * (1 - probability) / num_draws)
        assert abs(counts[entry] / num_draws - probability) <= 4.5 * error


def test_the_same_plan_in_every_process_and_on_every_machine():
    """Written down: no hash seed, process or library version may change it."""
    law = real_sized_law()
    assert law.draw((Stream.PLAN, 5, 3)).describe() == GOLDEN
    assert law.num_plans == GOLDEN_NUM_PLANS
    schedule = LayerSkipSchedule("sensitivity", 12, 0, 1, "layer", (0,) * 12, 5, measured=law)
    assert schedule.plan(3) == law.draw((Stream.PLAN, 5, 3))
    assert schedule.inclusion_probabilities() == law.inclusion_probabilities()
    assert len({schedule.plan(step) for step in range(50)}) > 10


def test_stages_share_the_budget_so_that_the_slowest_is_fastest():
    stages = [layer // 6 for layer in range(12)]
    balanced = real_sized_law(stages, saving_tolerance=0.0)
    for draw in range(20):
        seconds = balanced.stage_seconds(balanced.draw((draw,)))
        assert max(seconds) - min(seconds) <= 0.5 + 1e-9
    # One that only adds up savings does not: the cheap layers lie on the first stage.
    blind = real_sized_law(saving_tolerance=0.0)
    worst = [max(balanced.stage_seconds(blind.draw((draw,)))) for draw in range(20)]
    assert max(balanced.stage_seconds(balanced.draw((0,)))) <= min(worst)


def test_a_stage_that_is_quick_anyhow_costs_no_kl():
    stages = [layer // 6 for layer in range(12)]
    law = real_sized_law(stages, stage_extra_seconds=(0.0, 5.0))
    for draw in range(20):
        assert all(layer >= 6 for layer, _ in law.draw((draw,)).skipped)


def test_it_costs_less_than_uniform_at_the_same_saving():
    law = real_sized_law()
    plans = [law.draw((draw,)) for draw in range(30)]
    saved = sum(12 - law.stage_seconds(plan)[0] for plan in plans) / len(plans)
    uniform = [draw_plan("uniform", 12, int(saved), 1, [0] * 12, (draw,)) for draw in range(30)]
    mean = sum(map(law.predicted_kl, plans)) / 30
    assert mean <= 0.25
    assert mean < 0.3 * sum(map(law.predicted_kl, uniform)) / 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_budget": 0.001}, "the cheapest, attention of layer 1, costs"),
        (
            {"kl_budget": 0.001, "protected_layers": (1,)},
            "the cheapest, attention of layer 2, costs",
        ),
        ({"kl_budget": 0.0}, "kl_budget must be positive"),
        ({"saving_tolerance": 1.0}, "saving_tolerance is a share"),
        (
            {"border_layers": 6},
            "outside of the borders and protected layers: there is none that saves",
        ),
        ({"stages": (0,) * 11}, "stage_of_layer needs a stage"),
        (
            {"stages": (0,) * 6 + (1,) * 6, "protected_layers": (6, 7, 8, 9, 10, 11)},
            r"makes the slowest stage \(0\) no faster|slowest stage",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        real_sized_law(**changes)


def test_measurements_that_do_not_fit_are_refused():
    twice = (SkipOption(0, "mlp", 0.1, 1.0),) * 2
    with pytest.raises(ValueError, match="measured twice"):
        SensitivityLaw(2, twice, 1.0, (0, 0), 0.5)
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        SensitivityLaw(2, (SkipOption(2, "mlp", 0.1, 1.0),), 1.0, (0, 0), 0.5)
    with pytest.raises(ValueError, match="not finite"):
        SensitivityLaw(2, (SkipOption(1, "mlp", math.nan, 1.0),), 1.0, (0, 0), 0.5)
    law = SensitivityLaw(2, (SkipOption(1, "mlp", 0.1, 0.5),), 1.0, (0, 0), 0.5)
    with pytest.raises(ValueError, match="was not measured"):
        law.predicted_kl(LayerSkipPlan.parse("0", 2))
    with pytest.raises(ValueError, match="needs measurements"):
        LayerSkipSchedule("sensitivity", 2, 0, 0, "layer", (0, 0), 0)


def test_a_part_that_costs_the_whole_budget_is_within_it():
    law = SensitivityLaw(1, (SkipOption(0, "mlp", 0.5, 0.5),), 1.0, (0,), 0.5)
    assert law.draw((0,)).describe() == "0.mlp"


def test_a_stage_skips_no_more_than_pays():
    """The second stage can lose one layer, so the first one loses one, though four are cheap."""
    options = [SkipOption(layer, "layer", 0.01, 1.0) for layer in range(5)]
    law = SensitivityLaw(8, tuple(options), 1.0, (0,) * 4 + (1,) * 4, 1.0)
    for draw in range(20):
        plan = law.draw((draw,))
        assert plan.num_skipped == 2
        assert law.stage_seconds(plan) == [3.0, 3.0]
