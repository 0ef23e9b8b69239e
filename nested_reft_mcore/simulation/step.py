"""One step of all stages and replicas, from the first prompt to the updated weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.planning.run_plan import RunPlan
from nested_reft_mcore.planning.step_time import StepModel
from nested_reft_mcore.simulation.decode_timing import Passes, time_passes
from nested_reft_mcore.simulation.pipeline_schedule import ScheduleTimes, time_schedule
from nested_reft_mcore.simulation.rollout_phase import StackedRounds, time_of_passes
from nested_reft_mcore.simulation.update_phase import pack, pass_times

Array = NDArray[np.float64]
PARTS: tuple[str, ...] = (
    "generation",
    "judging",
    "logprobs",
    "update",
    "reduction",
    "optimizer",
    "rest",
)
"""What a step's seconds are split into, in order."""


@dataclass(frozen=True)
class Draw:
    """What chance decides of a step, for all replicas."""

    prompts: NDArray[np.int64]
    """Tokens of each prompt, `[prompts]`, replicas one after the other."""
    responses: NDArray[np.int64]
    """`[prompts, group_size]`."""
    rounds: StackedRounds

    @property
    def sequences(self) -> NDArray[np.int64]:
        """What goes into the model in an update: prompt and response less the last token."""
        return (self.prompts[:, None] + self.responses - 1).ravel()


@dataclass
class Phase:
    """A part of a step that begins and ends with everybody."""

    name: str
    start: float
    seconds: float
    busy: Array
    """Seconds in which each stage computes, `[replicas, stages]`."""
    waits_inside: Array
    """For other stages of its replica."""
    waits_outside: Array
    """For other replicas."""


@dataclass
class StepResult:
    """What a step took."""

    tokens: int
    """Prompt and response tokens, of all replicas."""
    response_tokens: int
    padding: float
    """Share of the update's tokens that is padding."""
    phases: list[Phase] = field(default_factory=list)
    passes: Passes | None = None
    """Of the generation, for a timeline."""
    schedules: list[tuple[str, ScheduleTimes]] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each of `PARTS`."""
        found = dict.fromkeys(PARTS, 0.0)
        for phase in self.phases:
            found[phase.name] += phase.seconds
        return found

    def summed(self, name: str, phase: str | None = None) -> Array:
        """`busy`, `waits_inside` or `waits_outside`, `[replicas, stages]`."""
        chosen = [p for p in self.phases if phase in (None, p.name)]
        return np.sum([getattr(p, name) for p in chosen], axis=0)


class StepSimulator:
    """Steps of one planned run; `step(draw, plan)` under a skip plan."""

    def __init__(self, run: RunPlan, factors: Array) -> None:
        """`factors` are `[replicas, stages]`: how much longer each takes."""
        slots = run.slots or run.workload.wanted_slots
        self._run = run
        self._layout = run.layout
        self._factors = factors
        self.model = StepModel(run.config, run.layout, run.workload, run.hardware, slots)
        self._latency = run.hardware.assumptions.message_latency_us * 1e-6

    def step(self, draw: Draw, plan: LayerSkipPlan) -> StepResult:
        """All phases; each begins when everybody has ended the one before."""
        result = StepResult(
            int(draw.responses.sum() + draw.prompts.sum() * draw.responses.shape[1]),
            int(draw.responses.sum()),
            padding=0.0,
        )
        self._generate(result, draw, plan)
        for _ in range(self.model.num_logprob_passes):
            result.padding = self._passes(result, "logprobs", draw.sequences)
        updates = self._run.config.train.updates_per_step
        for number in range(updates):
            # As TrainingBatch.deal: row r goes into mini-batch r modulo their number.
            rows = draw.sequences.reshape(self._layout.data, -1)[:, number::updates]
            result.padding = self._passes(result, "update", rows.ravel())
            stages = range(self._layout.pipeline)
            self._everybody(result, "optimizer", [self.model.optimizer_seconds(s) for s in stages])
        rest = [self.model.between_seconds()] * self._layout.pipeline
        self._everybody(result, "rest", rest)
        return result

    def _generate(self, result: StepResult, draw: Draw, plan: LayerSkipPlan) -> None:
        passes = time_of_passes(draw.rounds, plan, self._layout, self.model.decode, self._factors)
        result.passes = passes
        self._add(result, "generation", time_passes(passes), passes.busy)
        judging = self.model.judging_seconds()
        self._everybody(result, "judging", [judging] * self._layout.pipeline, works=False)

    def _passes(self, result: StepResult, name: str, sequences: NDArray[np.int64]) -> float:
        """Micro-batches through the pipeline; the share of padding."""
        shapes = pack(
            list(sequences.reshape(self._layout.data, -1)), self._run.config, self._layout
        )
        has_backward = name == "update"
        forward, backward = (
            pass_times(shapes, self.model, self._layout, self._factors, backward=is_backward)
            for is_backward in (False, True)
        )
        times = time_schedule(
            forward,
            backward if has_backward else None,
            np.zeros(self._layout.data),
            self._latency if self._layout.pipeline > 1 else 0.0,
        )
        result.schedules.append((name, times))
        if has_backward and self._layout.data > 1:
            self._update_and_reduce(result, times, forward, backward)
        else:
            self._add(result, name, times.ends.T, times.busy.T)
        return shapes.padding

    def _update_and_reduce(
        self, result: StepResult, times: ScheduleTimes, forward: Array, backward: Array
    ) -> None:
        """A stage's gradients are summed as soon as all replicas have them."""
        last = times.ends.max(axis=1)
        means = (forward + backward).sum(axis=1).mean(axis=(1, 2))
        reductions = np.asarray(
            [self.model.reduction_seconds(s, float(mean)) for s, mean in enumerate(means)]
        )
        self._add(result, "update", times.ends.T, times.busy.T)
        # What a stage's sum takes beyond the end of the last stage's passes.
        beyond = max(0.0, float((last + reductions).max() - last.max()))
        self._everybody(result, "reduction", [beyond] * self._layout.pipeline)

    def _add(self, result: StepResult, name: str, ends: Array, busy: Array) -> None:
        """A phase in which stages work at their own pace; `[replicas, stages]`."""
        of_replica = ends.max(axis=1, keepdims=True)
        seconds = float(of_replica.max())
        result.phases.append(
            Phase(
                name,
                result.total,
                seconds,
                busy,
                np.maximum(0.0, of_replica - busy),
                np.broadcast_to(seconds - of_replica, busy.shape),
            )
        )

    def _everybody(
        self, result: StepResult, name: str, seconds: list[float], *, works: bool = True
    ) -> None:
        """A phase in which all replicas do the same, stage by stage."""
        longest = max(seconds)
        busy = np.broadcast_to(seconds, (self._layout.data, self._layout.pipeline)).astype(float)
        waits = longest - busy
        if not works:
            busy, waits = np.zeros_like(busy), np.full_like(busy, longest)
        result.phases.append(Phase(name, result.total, longest, busy, waits, np.zeros_like(busy)))
