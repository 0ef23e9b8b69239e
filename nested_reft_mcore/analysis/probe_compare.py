"""Laws side by side: the measured KL of their plans where they save about the same time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, Part, SkipLaw, draw_plan
from nested_reft_mcore.analysis.skip_times import SkipTimes
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.probe_record import ComparedLaw, Divergence, ProbeRecord
from nested_reft_mcore.training.sensitivity_law import sensitivity_law

_PLANS = 6
"""Plans of each law that are measured."""
_TIMED_PLANS = 32
"""Plans whose predicted speed-up is averaged, which costs nothing."""
_KEY = 17

Measure = Callable[[Sequence[LayerSkipPlan], str], Sequence[Divergence]]


@dataclass(frozen=True)
class _Rival:
    """A law that skips a number of layers."""

    name: str
    law: SkipLaw
    part: Part
    border_layers: int
    protected_layers: tuple[int, ...] = ()


def compare_laws(
    record: ProbeRecord,
    budgets: Sequence[float],
    stage_of_layer: tuple[int, ...],
    seed: int,
    measure: Measure,
) -> tuple[ComparedLaw, ...]:
    """For each budget `sensitivity`, and other laws at the largest k that saves no more time.

    Others so get the benefit of rounding. Each plan's KL is measured; errors are over plans.

    Raises:
        UserError: a budget buys nothing.
    """
    rows: list[ComparedLaw] = []
    times = SkipTimes.of(record.times, stage_of_layer)
    for budget in budgets:
        try:
            law = sensitivity_law(record, budget, stage_of_layer)
        except ValueError as error:
            raise UserError(f"--compare {budget:g}: {error}") from None
        drawn = [law.draw((seed, _KEY, draw)) for draw in range(_TIMED_PLANS)]
        rows.append(_row("sensitivity", budget, drawn, times, measure))
        goal = rows[-1].speedup
        for rival in _rivals(record, stage_of_layer):
            plans = _as_fast(rival, goal, times, seed)
            if plans:
                rows.append(_row(rival.name, budget, plans, times, measure))
    return tuple(rows)


def _rivals(record: ProbeRecord, stage_of_layer: tuple[int, ...]) -> list[_Rival]:
    """The paper's law with one border layer, by part, protected as advised, and balanced."""
    rivals = [
        _Rival("uniform layer", "uniform", "layer", 1),
        _Rival("uniform attention", "uniform", "attention", 1),
        _Rival("uniform mlp", "uniform", "mlp", 1),
    ]
    for advice in record.advice:
        name = f"uniform {advice.part}, protected"
        protected = advice.protected_layers
        rivals.append(_Rival(name, "uniform", advice.part, advice.border_layers, protected))
    if max(stage_of_layer) > 0:
        # On one stage it is the same law.
        rivals.append(_Rival("stage_balanced layer", "stage_balanced", "layer", 1))
    return rivals


def _as_fast(rival: _Rival, goal: float, times: SkipTimes, seed: int) -> list[LayerSkipPlan] | None:
    """Plans of the largest number of layers whose mean predicted speed-up is at most `goal`.

    At least one layer; None where it has none to skip.
    """
    num_layers = len(times.stage_of_layer)
    best: list[LayerSkipPlan] | None = None
    for number in range(1, num_layers + 1):
        try:
            plans = [
                draw_plan(
                    rival.law,
                    num_layers,
                    number,
                    rival.border_layers,
                    times.stage_of_layer,
                    (seed, _KEY, number, draw),
                    rival.part,
                    times.stage_extra_in_layers,
                    rival.protected_layers,
                )
                for draw in range(_TIMED_PLANS)
            ]
        except ValueError:
            break
        if best is not None and statistics.mean(map(times.speedup, plans)) > goal:
            break
        best = plans
    return best


def _row(
    name: str,
    budget: float,
    plans: Sequence[LayerSkipPlan],
    times: SkipTimes,
    measure: Measure,
) -> ComparedLaw:
    chosen = list(dict.fromkeys(plans))[:_PLANS]
    found = measure(chosen, f"compare {name}")
    kls = [divergence.kl for divergence in found]
    error = statistics.stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else found[0].kl_error
    return ComparedLaw(
        law=name,
        kl_budget=budget,
        num_skipped=statistics.mean(plan.num_skipped for plan in chosen),
        num_measured=len(chosen),
        speedup=statistics.mean(map(times.speedup, chosen)),
        kl=statistics.mean(kls),
        kl_error=error,
        overlap=statistics.mean(divergence.overlap for divergence in found),
    )
