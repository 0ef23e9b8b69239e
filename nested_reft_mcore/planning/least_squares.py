"""Bounded least squares by Levenberg and Marquardt's method, with numeric derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_STEP = 1e-4
_MOST_ROUNDS = 40
_ENOUGH = 1e-6
_LARGEST_DAMPING = 1e8


@dataclass(frozen=True)
class Fit:
    """Where the sum of squares is least."""

    values: Array
    deviations: Array
    """Of the values, from the curvature: one where a residual's deviation is one."""
    cost: float
    """Half of the sum of squares."""


def least_squares(
    residuals: Callable[[Array], Array], start: Array, lower: Array, upper: Array
) -> Fit:
    """Minimise the sum of squared residuals within bounds.

    Args:
        residuals: Of some values; in units of their deviations.
        start: Within the bounds.
        lower: A bound for each value.
        upper: The same.

    Raises:
        ValueError: `start` is outside of the bounds, or a residual there is not finite.
    """
    if (start < lower).any() or (start > upper).any():
        raise ValueError("expected a start within the bounds")
    values, found = start.astype(np.float64), residuals(start)
    if not np.isfinite(found).all():
        raise ValueError("expected finite residuals at the start")
    cost, damping = 0.5 * float(found @ found), 1e-3
    slopes = _slopes(residuals, values, found, lower, upper)
    for _ in range(_MOST_ROUNDS):
        curvature, gradient = slopes.T @ slopes, slopes.T @ found
        # Values at a bound that would leave it stay there.
        free = ~(((values <= lower) & (gradient > 0)) | ((values >= upper) & (gradient < 0)))
        before = cost
        while damping < _LARGEST_DAMPING:
            step = _damped_step(curvature, gradient, free, damping)
            tried = np.clip(values + step, lower, upper)
            there = residuals(tried)
            new_cost = 0.5 * float(there @ there) if np.isfinite(there).all() else np.inf
            if new_cost < cost:
                values, found, cost = tried, there, new_cost
                damping = max(damping / 5, 1e-9)
                break
            damping *= 4
        if before - cost <= _ENOUGH * max(before, 1e-12):
            break
        slopes = _slopes(residuals, values, found, lower, upper)
    curvature = slopes.T @ slopes
    spread = np.linalg.pinv(curvature + 1e-12 * np.eye(len(values)))
    return Fit(values, np.sqrt(np.diag(spread)), cost)


def _damped_step(
    curvature: Array, gradient: Array, free: NDArray[np.bool_], damping: float
) -> Array:
    step = np.zeros_like(gradient)
    if not free.any():
        return step
    inner = curvature[np.ix_(free, free)]
    scale = damping * np.diag(np.diag(inner) + 1e-9)
    step[free] = -np.linalg.solve(inner + scale, gradient[free])
    return step


def _slopes(
    residuals: Callable[[Array], Array], values: Array, found: Array, lower: Array, upper: Array
) -> Array:
    columns = []
    for place in range(len(values)):
        # Away from a bound that is near.
        move = _STEP if values[place] + _STEP <= upper[place] else -_STEP
        moved = values.copy()
        moved[place] += move
        columns.append((residuals(moved) - found) / move)
    return np.stack(columns, axis=1)
