"""What skip plans gain in generation, plan by plan, with how sure their mean is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.simulation.simulate import Simulation


@dataclass(frozen=True)
class Mean:
    """A mean over plans, each drawn by itself."""

    value: float
    error: float
    """Its standard error; 0 where there is one plan."""

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Mean:
        """Of `[plans]`; ValueError where there is none."""
        if not values.size:
            raise ValueError("no values to take the mean of")
        error = values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else 0.0
        return cls(float(values.mean()), float(error))

    def text(self) -> str:
        """Such as `1.10x ± 0.02`."""
        return f"{self.value:.2f}x ± {self.error:.2f}"


def gains_by_step(nested: Simulation, full: Simulation) -> NDArray[np.float64]:
    """Seconds of generation in `full` over those in `nested`, step by step, `[steps]`.

    Both have drawn the same lengths, so what differs is the plan. ValueError where they have not.
    """
    if len(nested.draws) != len(full.draws) or not all(
        np.array_equal(one.responses, other.responses)
        for one, other in zip(nested.draws, full.draws, strict=True)
    ):
        raise ValueError("expected the same steps with the same lengths in both simulations")
    return _generation(full) / _generation(nested)


def _generation(made: Simulation) -> NDArray[np.float64]:
    return np.asarray([step.seconds["generation"] for step in made.steps])
