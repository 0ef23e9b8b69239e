"""How much the behavior policy skips, steered by how far off-policy it is. Pure Python.

Each metric becomes an *off-policyness*, 0 on-policy and larger farther off: the KL itself, or one
minus the effective sample size or percentile. `update` looks at means over windows of `patience`
steps:

- above the limit: one level less is skipped, and the level that did not hold is barred: each time
  it fails, twice as long as before, up to `max_wait` steps;
- below the limit by the share `hysteresis`, and no longer barred: one level more is tried;
- between: all stays as it is.

A window that is lost (its sum is over the limit's, whatever were to come) ends at once, so a level
that is far off costs a step, not a window. Nothing skipped says nothing about skipping: the lowest
level is then tried again when its bar ends, which is every `max_wait` steps where nothing helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

METRIC_NAMES: dict[str, str] = {
    "ess": "nested/ess",
    "ess_seq": "nested/ess_seq",
    "kl": "rollout_corr/kl",
    "ratio_p05": "nested/ratio_p05",
}
"""What can be controlled, and what a step's metrics call it."""

NUM_NON_FINITE = "nested/num_non_finite_ratios"


@dataclass(frozen=True)
class ControllerSettings:
    """What is aimed at. Raises ValueError for values that make no sense."""

    metric: str
    """Which off-policyness: a key of `METRIC_NAMES`."""
    target: float
    """The worst value that is kept: least `ess`, `ess_seq` or `ratio_p05`, most `kl` in nats."""
    levels: tuple[int, ...]
    """How much may be skipped, ascending from 0: numbers of entries of a plan."""
    hysteresis: float = 0.3
    """More is tried only below (1 - this) times the off-policyness of the target."""
    patience: int = 4
    """Steps whose mean decides."""
    max_wait: int = 64
    """Longest wait, in steps, before a level that failed is tried again."""

    def __post_init__(self) -> None:
        if self.metric not in METRIC_NAMES:
            raise ValueError(f"unknown metric {self.metric!r}: one of {', '.join(METRIC_NAMES)}")
        if not 0 < self.limit < math.inf:
            raise ValueError(
                f"a target of {self.target} for {self.metric}: expected a positive KL, or a share "
                "between 0 and 1"
            )
        if self.levels[:1] != (0,) or sorted(set(self.levels)) != list(self.levels):
            raise ValueError(f"levels ascend from 0, got {self.levels}")
        if not 0 <= self.hysteresis < 1:
            raise ValueError(f"hysteresis lies between 0 and 1, got {self.hysteresis}")
        if not 1 <= self.patience <= self.max_wait:
            raise ValueError(
                f"expected 1 <= patience <= max_wait, got {self.patience} and {self.max_wait}"
            )

    @property
    def limit(self) -> float:
        """The target's off-policyness."""
        return self.target if self.metric == "kl" else 1.0 - self.target


@dataclass(frozen=True)
class ControllerState:
    """What is skipped and what has been learnt; the same on every process, JSON in a checkpoint."""

    level: int
    """Skipped in the next step: one of the settings' `levels`."""
    metric: str
    """What `total` is a sum of."""
    count: int = 0
    """Steps of the window so far."""
    total: float = 0.0
    """Their off-policyness, summed; always finite."""
    held: int = 0
    """Steps of whole windows since `level` was taken."""
    failures: tuple[tuple[int, int], ...] = ()
    """(level, times that it did not hold), ascending; what is not named has not failed."""
    num_changes: int = 0
    """Times that the level has moved."""

    @classmethod
    def start(cls, settings: ControllerSettings, level: int) -> ControllerState:
        """Begin at the largest level that is not above `level`."""
        return cls(_at_most(settings, level), settings.metric)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], settings: ControllerSettings) -> ControllerState:
        """Inverse of `to_dict`, also where it went through JSON.

        Where the settings have changed meanwhile the level is kept, or the largest one below it,
        and the window is begun again.
        """
        values = dict(record)
        values["failures"] = tuple((int(level), int(times)) for level, times in record["failures"])
        state = cls(**values)
        level = _at_most(settings, state.level)
        if (level, settings.metric) == (state.level, state.metric):
            return state
        return cls(level, settings.metric, num_changes=state.num_changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        return asdict(self)

    def num_failures(self, level: int) -> int:
        """How often `level` did not hold."""
        return dict(self.failures).get(level, 0)


def off_policyness(metric: str, metrics: Mapping[str, float]) -> float | None:
    """0 on-policy, larger farther off; None where a step's `metrics` tell nothing.

    A step without one usable ratio is infinitely far off if there were broken ones, and tells
    nothing if there were none at all.
    """
    value = metrics.get(METRIC_NAMES[metric], math.nan)
    if math.isnan(value):
        return math.inf if metrics.get(NUM_NON_FINITE, 0.0) > 0 else None
    # The plain KL estimate is negative by chance.
    return max(0.0, value if metric == "kl" else 1.0 - value)


def wait_before(settings: ControllerSettings, state: ControllerState, level: int) -> int:
    """Steps to hold the level below before `level` is tried (again)."""
    # The exponent is bounded, so that a run of any length stays in small integers.
    doublings = min(state.num_failures(level), settings.max_wait.bit_length())
    return min(settings.patience * 2**doublings, settings.max_wait)


def update(
    settings: ControllerSettings, state: ControllerState, metrics: Mapping[str, float]
) -> ControllerState:
    """The state after a step that ran at `state.level` and had these metrics."""
    measured = off_policyness(settings.metric, metrics)
    if measured is None:
        return state
    count, total = state.count + 1, state.total + measured
    is_lost = total > settings.patience * settings.limit
    if count < settings.patience and not is_lost:
        return replace(state, count=count, total=total)
    state = replace(state, count=0, total=0.0, held=state.held + count)
    place = settings.levels.index(state.level)
    if is_lost:
        return _lower(settings, state, place)
    may_raise = total / count <= settings.limit * (1.0 - settings.hysteresis)
    if not may_raise or place + 1 == len(settings.levels):
        return state
    above = settings.levels[place + 1]
    if state.held < wait_before(settings, state, above):
        return state
    return _move(state, above)


def _lower(settings: ControllerSettings, state: ControllerState, place: int) -> ControllerState:
    """One level less, and a bar on this one; nothing is left to lower at 0."""
    if place == 0:
        return state
    # A level that has held for as long as its bar was right to be tried, and is not barred longer.
    has_held = state.held >= wait_before(settings, state, state.level)
    failures = max(1, state.num_failures(state.level) + (0 if has_held else 1))
    barred = dict(state.failures) | {state.level: failures}
    state = replace(state, failures=tuple(sorted(barred.items())))
    return _move(state, settings.levels[place - 1])


def _move(state: ControllerState, level: int) -> ControllerState:
    return replace(state, level=level, held=0, num_changes=state.num_changes + 1)


def _at_most(settings: ControllerSettings, level: int) -> int:
    return max(one for one in settings.levels if one <= max(level, 0))
