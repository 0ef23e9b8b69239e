"""What skipping gains, under the configured law and under the other one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, SkipLaw, predicted_speedup
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule, head_on_last_stage
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.step_time import StepModel

_NUM_PLANS = 32
LAWS: tuple[SkipLaw, ...] = ("stage_balanced", "uniform")


@dataclass(frozen=True)
class SkipGain:
    """Gains of one law over full depth; means over the plans of its first steps."""

    law: SkipLaw
    num_skipped: int
    counted: float
    """Speed-up of the fullest stage by the number of layers (`algorithm.layer_skip`)."""
    generation: float
    """Of the generation, by the time model."""
    step: float
    """Of the whole step."""


def skip_plans(config: Config, layout: Layout, law: SkipLaw | None = None) -> list[LayerSkipPlan]:
    """The plans of a run's first steps, under its own law or another.

    Full depth where the rollouts skip nothing, or what a probe decides.
    """
    nested, num_layers = config.nested, layout.architecture.num_layers
    count = num_skipped(nested, num_layers)
    law = law or ("uniform" if nested.law == "sensitivity" else nested.law)
    if config.rollout.mode == "full" or count == 0:
        return [LayerSkipPlan.full(num_layers)]
    schedule = LayerSkipSchedule(
        law=law,
        num_layers=num_layers,
        num_skipped=count,
        border_layers=nested.border_layers,
        part=nested.part,
        stage_of_layer=layout.stage_of_layer,
        seed=config.seed,
        stage_extra_cost=head_on_last_stage(nested.head_cost, layout.pipeline),
        protected_layers=nested.protected_layers,
    )
    return list(_drawn(schedule))


@lru_cache(maxsize=16)
def _drawn(schedule: LayerSkipSchedule) -> tuple[LayerSkipPlan, ...]:
    return tuple(schedule.plan(step) for step in range(_NUM_PLANS))


def skip_gains(config: Config, layout: Layout, model: StepModel) -> list[SkipGain]:
    """Each law's gains; empty where the rollouts skip nothing."""
    count = num_skipped(config.nested, layout.architecture.num_layers)
    if config.rollout.mode == "full" or count == 0:
        return []
    full = [LayerSkipPlan.full(layout.architecture.num_layers)]
    baseline = model.step(full)
    if config.rollout.mode == "speculative":
        # What it replaces is plain decoding at full depth, not a draft that skips nothing.
        plain = model.decode.plain_seconds(full[0])
        baseline = replace(baseline, generation=plain)
    extra = head_on_last_stage(config.nested.head_cost, layout.pipeline)
    gains = []
    for law in LAWS:
        plans = skip_plans(config, layout, law)
        speedups = [predicted_speedup(plan, layout.stage_of_layer, extra) for plan in plans]
        step = model.step(plans)
        gains.append(
            SkipGain(
                law,
                count,
                counted=math.fsum(speedups) / len(speedups),
                generation=baseline.generation / step.generation,
                step=baseline.total / step.total,
            )
        )
    return gains
