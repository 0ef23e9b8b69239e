"""How much each step of a run skips: what the configuration says, or what the controller finds."""

from __future__ import annotations

from typing import Any

from nested_reft_mcore.algorithm.layer_skip import (
    LayerSkipPlan,
    predicted_speedup,
)
from nested_reft_mcore.algorithm.skip_controller import (
    ControllerSettings,
    ControllerState,
    off_policyness,
    update,
    wait_before,
)
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ControllerConfig


class SkipSteering:
    """Draws the plan of every step, and learns from the step's metrics how much to skip."""

    def __init__(
        self, config: ControllerConfig, schedule: LayerSkipSchedule, saved: dict[str, Any]
    ) -> None:
        """Start at the schedule's own number, or where `saved`, a `state_dict`, was taken.

        Raises:
            UserError: the controller has nothing to choose from.
        """
        self._schedule = schedule
        self._settings: ControllerSettings | None = None
        self._state: ControllerState | None = None
        if config.metric == "none":
            return
        assert config.target is not None, "checked before any process started"
        self._settings = ControllerSettings(
            metric=config.metric,
            target=config.target,
            levels=skip_levels(schedule, config.min_skipped, config.max_skipped),
            hysteresis=config.hysteresis,
            patience=config.patience,
            max_wait=config.max_wait,
        )
        self._state = (
            ControllerState.from_dict(saved, self._settings)
            if saved
            else ControllerState.start(self._settings, schedule.num_skipped)
        )

    def plan(self, step: int) -> LayerSkipPlan:
        """The plan of this step: a function of (seed, step, level), the same on every process."""
        if self._state is None:
            return self._schedule.plan(step)
        return self._schedule.plan(step, self._state.level)

    def learn(self, metrics: dict[str, float]) -> dict[str, float]:
        """Take in the metrics of a step that ran under its plan; returns the controller's own."""
        if self._settings is None or self._state is None:
            return {}
        self._state = update(self._settings, self._state, metrics)
        return self._metrics(self._settings, self._state, metrics)

    def state_dict(self) -> dict[str, Any]:
        """JSON values that a resumed run goes on from; empty where nothing is steered."""
        return {} if self._state is None else self._state.to_dict()

    @staticmethod
    def _metrics(
        settings: ControllerSettings, state: ControllerState, metrics: dict[str, float]
    ) -> dict[str, float]:
        levels = settings.levels
        place = levels.index(state.level)
        above = levels[place + 1] if place + 1 < len(levels) else None
        wait = 0 if above is None else max(0, wait_before(settings, state, above) - state.held)
        found = {
            "controller/limit": settings.limit,
            "controller/next_num_skipped": float(state.level),
            "controller/steps_before_raise": float(wait),
            "controller/num_changes": float(state.num_changes),
        }
        measured = off_policyness(settings.metric, metrics)
        return found if measured is None else found | {"controller/off_policyness": measured}


def skip_levels(schedule: LayerSkipSchedule, least: int, most: int | None) -> tuple[int, ...]:
    """Numbers of entries that are worth skipping, from `least` to `most`, and 0.

    Under `stage_balanced` the fullest stage sets the pace: with four equal stages two entries more
    cost KL and gain no time until there are four. Only numbers whose pace is better than that of
    every smaller one are levels, so that the controller pays for nothing. Under `uniform` every
    number gains on average.

    Raises:
        UserError: none is left between the bounds.
    """
    borders = schedule.border_layers
    inner = range(borders, schedule.num_layers - borders)
    between = len(set(inner) - set(schedule.protected_layers))
    most = between if most is None else min(most, between)
    candidates = range(1, most + 1)
    if schedule.law == "stage_balanced":
        # Every plan of a size has the same pace under this law.
        paces = [
            predicted_speedup(
                schedule.plan(0, number), schedule.stage_of_layer, schedule.stage_extra_cost
            )
            for number in range(most + 1)
        ]
        worthwhile = [n for n in candidates if paces[n] > max(paces[:n]) + 1e-9]
    else:
        worthwhile = list(candidates)
    levels = tuple(number for number in worthwhile if number >= least)
    if not levels:
        raise UserError(
            f"controller: from min_skipped={least} to max_skipped={most} no number of skipped "
            f"entries makes generation faster; those that do: {worthwhile or 'none'}"
        )
    return (0, *levels)
