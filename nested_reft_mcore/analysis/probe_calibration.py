"""Which plans a probe fits its prediction of KL to."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan

_WITHIN = 1 / 3
"""Share of the calibration plans that has to be within the budget itself, if any plans are."""
_MOST_CALIBRATIONS = 5
_TOO_DEAR = 1.5
"""Measured / predicted, geometric mean: above it a budget would be exceeded as a rule."""
_MOST_FITS = 4


def plans_near_budget(
    kl_budget: float,
    draw: Callable[[float], list[LayerSkipPlan]],
    measure: Callable[[list[LayerSkipPlan]], list[float]],
) -> list[LayerSkipPlan]:
    """Plans to fit a prediction of KL to, a third of them within the budget if there are such.

    Where parts cost far more together than their sum, plans whose sums are near the budget say
    nothing about it: smaller sums are tried.

    Args:
        kl_budget: Nats per token.
        draw: A bound on the sum of the parts' KLs to plans; none where it buys nothing.
        measure: Plans to their KLs.
    """
    bound, plans = kl_budget, list[LayerSkipPlan]()
    for _ in range(_MOST_CALIBRATIONS):
        cheaper = draw(bound)
        if not cheaper:
            break
        plans = cheaper
        within = sum(kl <= kl_budget for kl in measure(plans))
        if within >= _WITHIN * len(plans):
            break
        bound /= 4
    return plans


def plans_of_a_fair_fit(
    calibration: list[LayerSkipPlan],
    test: Callable[[list[LayerSkipPlan]], tuple[list[LayerSkipPlan], list[float]]],
) -> list[LayerSkipPlan]:
    """Calibration plans whose fit does not promise too much where the budget ends.

    A fit to plans of like sums says little elsewhere. So plans that cost clearly more than it
    predicts join those that it is made from, and the next fit is tested on others.

    Args:
        calibration: Plans to begin with.
        test: Plans to others, drawn by the law of their fit, and measured / predicted of each of
            which both are positive.
    """
    for _ in range(_MOST_FITS - 1):
        unseen, ratios = test(calibration)
        if not ratios or statistics.geometric_mean(ratios) <= _TOO_DEAR:
            break
        calibration = [*calibration, *unseen]
    return calibration
