"""A run that was made and timed, as calibration and its check need it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.planning.expected_step import (
    PROMPT_SPREAD,
    ExpectedStep,
    step_under_laws,
)
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.lengths import LengthLaw
from nested_reft_mcore.planning.step_time import StepModel, StepTime
from nested_reft_mcore.planning.workload import Workload, workload_of

PARTS = ("generation", "logprobs", "update", "rest")
_TIMERS = {
    "generation": ("timing_s/gen",),
    "logprobs": ("timing_s/old_log_prob", "timing_s/ref"),
    "update": ("timing_s/update_actor",),
}
_STEP, _PLAN = "timing_s/step", "nested/plan"
_TOKENS = "perf/total_num_tokens"
_RESPONSE_SPREAD = 0.7

Step = Mapping[str, float | None]
Average = Callable[[Sequence[float]], float]
"""The mean, or the median."""


@dataclass(frozen=True)
class TimedStep:
    """One step: its plan and where its seconds went."""

    plan: LayerSkipPlan
    seconds: dict[str, float]
    """Of each of `PARTS`; `rest` is what the others leave of the step."""

    @property
    def total(self) -> float:
        """Of the step."""
        return math.fsum(self.seconds.values())


@dataclass(frozen=True)
class MeasuredRun:
    """A run of `train` whose first step is left out: it warms caches up."""

    name: str
    config: Config
    layout: Layout
    workload: Workload
    expected: ExpectedStep
    """Lengths of a step as they were generated."""
    steps: tuple[TimedStep, ...]
    tokens: float
    """Prompt and response tokens of a step, of all replicas; the median."""

    @cached_property
    def seconds(self) -> dict[str, float]:
        """The median of each part over the steps."""
        return {
            part: statistics.median(step.seconds[part] for step in self.steps) for part in PARTS
        }

    @cached_property
    def step_seconds(self) -> float:
        """The median step."""
        return statistics.median(step.total for step in self.steps)

    @cached_property
    def plans(self) -> dict[LayerSkipPlan, int]:
        """Plans of the timed steps, each once for those that cost the same, and how many have it.

        What a plan costs depends on how many attentions and MLPs each stage runs.
        """
        found: dict[tuple[tuple[int, int], ...], tuple[LayerSkipPlan, int]] = {}
        for step in self.steps:
            key = self.stage_loads(step.plan)
            plan, count = found.get(key, (step.plan, 0))
            found[key] = plan, count + 1
        return dict(found.values())

    def stage_loads(self, plan: LayerSkipPlan) -> tuple[tuple[int, int], ...]:
        """Attentions and MLPs that each stage runs: what a plan costs depends on them alone."""
        counts = [[0, 0] for _ in range(self.layout.pipeline)]
        for layer, stage in enumerate(self.layout.stage_of_layer):
            counts[stage][0] += not plan.skips_attention(layer)
            counts[stage][1] += not plan.skips_mlp(layer)
        return tuple((attentions, mlps) for attentions, mlps in counts)

    def model(self, hardware: HardwareProfile) -> StepModel:
        """What the performance model makes of it on some machine."""
        slots = self.workload.wanted_slots
        args = (self.config, self.layout, self.workload, hardware, slots)
        return StepModel(*args, self.expected)

    def predict(self, hardware: HardwareProfile, average: Average = statistics.median) -> StepTime:
        """Seconds of its steps: generation is the average over the plans that they had."""
        model = self.model(hardware)
        times = [model.decode.seconds(plan) for plan, n in self.plans.items() for _ in range(n)]
        return model.step_with(average(times))


def measured_run(
    name: str,
    config: Config,
    world_size: int,
    gpus_per_node: int,
    steps: Sequence[Step],
    plans: Mapping[int, str],
    response_lengths: Sequence[int] = (),
) -> MeasuredRun:
    """From what a run directory holds.

    Args:
        name: For messages and tables.
        config: The run's own.
        world_size: Processes.
        gpus_per_node: Processes of a node.
        steps: Metrics of each step, with `step`; the first one is left out.
        plans: What each step skipped, as `LayerSkipPlan.describe` says it.
        response_lengths: Those of dumped rollouts; left out: a law with the measured mean.

    Raises:
        UserError: fewer than two steps, steps without times or plans, or a run of another kind.
    """
    if config.rollout.mode == "speculative" or config.algorithm.filter_groups:
        raise UserError(
            f"{name}: rollout.mode=speculative and algorithm.filter_groups have no model of time "
            "to be calibrated; expected rollouts of mode `nested` or `full`, each once"
        )
    timed = [step for step in steps if _STEP in step][1:]
    if not timed:
        raise UserError(
            f"{name}: has fewer than two steps with {_STEP}; the first one is not counted"
        )
    architecture = model_architecture(config.model)
    nodes = -(-world_size // gpus_per_node)
    layout = Layout.of(architecture, config.parallel, nodes, min(gpus_per_node, world_size))
    workload = workload_of(config, layout, "cpu")
    laws = _laws(config, timed, response_lengths)
    expected = step_under_laws(*laws, config, layout, workload, workload.wanted_slots)
    found = tuple(_timed_step(name, step, plans, layout) for step in timed)
    tokens = statistics.median(_number(name, step, _TOKENS) for step in timed)
    return MeasuredRun(name, config, layout, workload, expected, found, tokens)


def _timed_step(name: str, step: Step, plans: Mapping[int, str], layout: Layout) -> TimedStep:
    number = int(step.get("step") or 0)
    if number not in plans:
        raise UserError(f"{name}: step {number} has no {_PLAN}; expected a run of `train`")
    seconds = {
        part: math.fsum(step.get(timer) or 0.0 for timer in timers)
        for part, timers in _TIMERS.items()
    }
    seconds["rest"] = max(0.0, _number(name, step, _STEP) - math.fsum(seconds.values()))
    plan = LayerSkipPlan.parse(plans[number], layout.architecture.num_layers)
    return TimedStep(plan, seconds)


def _laws(
    config: Config, steps: Sequence[Step], responses: Sequence[int]
) -> tuple[LengthLaw, LengthLaw]:
    """Of prompts and of responses, as they were."""
    longest = int(max(step.get("prompt_length/max") or 0 for step in steps))
    prompt = _law(steps, "prompt_length", longest, PROMPT_SPREAD)
    limit = config.rollout.max_new_tokens
    if responses:
        cut = [min(length, limit) for length in responses]
        return prompt, LengthLaw("observed", statistics.fmean(cut), limit, observed=tuple(cut))
    return prompt, _law(steps, "response_length", limit, _RESPONSE_SPREAD)


def _law(steps: Sequence[Step], name: str, limit: int, spread: float) -> LengthLaw:
    def mean_of(which: str) -> float:
        return statistics.fmean(step.get(f"{name}/{which}") or 0.0 for step in steps)

    mean = max(1.0, mean_of("mean"))
    is_fixed = mean_of("min") == mean_of("max")
    return LengthLaw("fixed" if is_fixed else "lognormal", mean, max(1, limit), spread)


def _number(name: str, step: Step, key: str) -> float:
    value: Any = step.get(key)
    if not isinstance(value, (int, float)) or not value > 0:
        raise UserError(f"{name}: step {step.get('step')}: {key} is {value!r}; expected above 0")
    return float(value)
