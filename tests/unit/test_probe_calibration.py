"""Which plans a probe fits its prediction of KL to."""

import pytest

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.analysis.probe_calibration import plans_near_budget, plans_of_a_fair_fit

NUM_LAYERS = 64


def total(plan: LayerSkipPlan) -> float:
    """Layers cost 0.001 alone."""
    return 0.001 * len(plan.skipped)


def draw(bound: float) -> list[LayerSkipPlan]:
    largest = min(NUM_LAYERS, int(bound / 0.001 + 1e-9))
    numbers = sorted({max(1, round(share * largest)) for share in (0.3, 0.6, 1.0)})
    return [first(number) for number in numbers] if largest else []


def first(number: int) -> LayerSkipPlan:
    return LayerSkipPlan(NUM_LAYERS, frozenset((layer, "layer") for layer in range(number)))


@pytest.mark.parametrize(
    ("scale", "exponent", "expected"),
    [
        # Sums for KLs: the first third is within the budget at once.
        (1.0, 1.0, [10, 19, 32]),
        # Ten layers cost 1, two 0.09, one 0.0316.
        (1e3, 1.5, [1, 2]),
    ],
)
def test_plans_reach_down_to_the_budget(scale: float, exponent: float, expected: list[int]) -> None:
    def measure(plans: list[LayerSkipPlan]) -> list[float]:
        return [scale * total(plan) ** exponent for plan in plans]

    plans = plans_near_budget(0.032, draw, measure)
    assert [len(plan.skipped) for plan in plans] == expected


def test_the_cheapest_are_kept_where_nothing_is_within() -> None:
    plans = plans_near_budget(0.032, draw, lambda plans: [9.0] * len(plans))
    assert [len(plan.skipped) for plan in plans] == [1, 2]
    assert plans_near_budget(0.0005, draw, lambda plans: []) == []


def test_a_fit_that_promises_too_much_learns_from_what_it_promised() -> None:
    def measured(plan: LayerSkipPlan) -> float:
        return 1e3 * total(plan) ** 1.5

    def test(plans: list[LayerSkipPlan]) -> tuple[list[LayerSkipPlan], list[float]]:
        """Plans of the budget, by the mean factor of those that were seen."""
        factor = sum(measured(plan) / total(plan) for plan in plans) / len(plans)
        unseen = draw(0.5 / factor)[-1:]
        return unseen, [measured(plan) / (factor * total(plan)) for plan in unseen]

    few = [first(1)]
    plans = plans_of_a_fair_fit(few, test)
    # Fifteen layers cost 3.9 times what one layer promises; the next fit may rest.
    assert [len(plan.skipped) for plan in plans] == [1, 15]
    assert max(test(plans)[1]) <= 1.5
    # A fit that nothing satisfies ends, too; one without plans to test it stays.
    endless = plans_of_a_fair_fit(few, lambda plans: ([first(len(plans) + 1)], [9.0]))
    assert len(endless) == 4
    assert plans_of_a_fair_fit(few, lambda plans: ([], [])) == few
