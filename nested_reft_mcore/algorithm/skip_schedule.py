"""The plan of every step of a run, under whichever law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from nested_reft_mcore.algorithm.counter_random import Stream
from nested_reft_mcore.algorithm.layer_skip import (
    LayerSkipPlan,
    Part,
    SkipLaw,
    draw_plan,
    inclusion_probabilities,
)


@runtime_checkable
class PlanLaw(Protocol):
    """A law that knows by itself what to skip: `sensitivity.SensitivityLaw`."""

    def draw(self, key: tuple[int, ...]) -> LayerSkipPlan:
        """The plan that belongs to `key`."""
        ...

    def inclusion_probabilities(self) -> list[float]:
        """Probability that something of each layer is skipped."""
        ...


def head_on_last_stage(head_cost: float, num_stages: int) -> tuple[float, ...]:
    """What each pipeline stage spends besides its layers, in the unit of `head_cost`."""
    return (*[0.0] * (num_stages - 1), head_cost)


@dataclass(frozen=True)
class LayerSkipSchedule:
    """The plan of every step of a run; arguments as for `draw_plan`.

    Raises ValueError where the law `sensitivity` is named without its `measured`.
    """

    law: SkipLaw | Literal["sensitivity"]
    num_layers: int
    num_skipped: int
    border_layers: int
    part: Part
    stage_of_layer: tuple[int, ...]
    seed: int
    stage_extra_cost: tuple[float, ...] | None = None
    protected_layers: tuple[int, ...] = ()
    measured: PlanLaw | None = None
    """The law `sensitivity`, with its measurements and its budget."""

    def __post_init__(self) -> None:
        if self.law == "sensitivity" and self.measured is None:
            raise ValueError("the law `sensitivity` needs measurements")

    def plan(self, step: int, num_skipped: int | None = None) -> LayerSkipPlan:
        """The plan of this step, a function of (seed, step, number skipped) alone.

        `num_skipped` takes the place of the schedule's own number; `sensitivity` has none.
        """
        key = (Stream.PLAN, self.seed, step)
        if self.law == "sensitivity":
            assert self.measured is not None, "checked when the schedule was made"
            return self.measured.draw(key)
        return draw_plan(
            self.law,
            self.num_layers,
            self.num_skipped if num_skipped is None else num_skipped,
            self.border_layers,
            self.stage_of_layer,
            key,
            self.part,
            self.stage_extra_cost,
            self.protected_layers,
        )

    def inclusion_probabilities(self) -> list[float]:
        """Probability of being skipped, whole or in part, for each layer."""
        if self.law == "sensitivity":
            assert self.measured is not None, "checked when the schedule was made"
            return self.measured.inclusion_probabilities()
        return inclusion_probabilities(
            self.law,
            self.num_layers,
            self.num_skipped,
            self.border_layers,
            self.stage_of_layer,
            self.part,
            self.stage_extra_cost,
            self.protected_layers,
        )
