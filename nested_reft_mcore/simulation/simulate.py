"""Some steps of a configuration on machines that need not exist, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import config_from_dict
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.expected_step import prompt_law
from nested_reft_mcore.planning.hardware import DEFAULT_HARDWARE, HardwareProfile
from nested_reft_mcore.planning.lengths import LengthLaw, length_law
from nested_reft_mcore.planning.run_plan import RunPlan, make_plan
from nested_reft_mcore.planning.skip_gain import skip_plans
from nested_reft_mcore.planning.slots import Batching, count_rounds
from nested_reft_mcore.planning.workload import mean_response
from nested_reft_mcore.simulation.rollout_phase import stack
from nested_reft_mcore.simulation.step import Draw, StepResult, StepSimulator
from nested_reft_mcore.simulation.stragglers import Stragglers


@dataclass(frozen=True)
class Scenario:
    """What is simulated; the configuration says model, layout and batch."""

    config: Config
    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gb: float | None = None
    hardware: HardwareProfile | str = DEFAULT_HARDWARE
    lengths: str = "lognormal"
    """Law or file of response lengths, as `lengths.length_law` takes it."""
    length_spread: float = 0.7
    length_correlation: float = 0.5
    batching: Batching = "continuous"
    groups: int | None = None
    """Slot groups in flight; None: as many as stages, as the engine has it."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    steps: int = 4
    seed: int = 0

    def changed(self, options: dict[str, Any] | None = None, **fields: Any) -> Scenario:
        """The same with options of the configuration (`section.field`) and own fields replaced."""
        data = self.config.model_dump(mode="json")
        for key, value in (options or {}).items():
            section, name = key.split(".")
            data[section][name] = value
        return replace(self, config=config_from_dict(data, "simulate"), **fields)


@dataclass(frozen=True)
class Simulation:
    """What came out; means are over steps."""

    scenario: Scenario
    run: RunPlan
    law: LengthLaw
    factors: NDArray[np.float64]
    """How much longer each stage takes than the machines' profile says, `[replicas, stages]`."""
    steps: tuple[StepResult, ...]
    draws: tuple[Draw, ...]

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Mean and standard deviation of a step's seconds."""
        totals = [step.total for step in self.steps]
        return float(np.mean(totals)), float(np.std(totals))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part of a step."""
        parts = [step.seconds for step in self.steps]
        return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """`perf/throughput`: prompt and response tokens a second on each GPU."""
        tokens = sum(step.tokens for step in self.steps)
        return tokens / sum(step.total for step in self.steps) / self.run.layout.world_size

    @property
    def generated_per_second_per_gpu(self) -> float:
        """Response tokens a second of generation on each GPU."""
        return self._generated(sum(step.seconds["generation"] for step in self.steps))

    @property
    def generation_ceiling(self) -> float:
        """The same if no stage ever waited: by the time in which stages compute."""
        busy = sum(float(step.summed("busy", "generation").mean()) for step in self.steps)
        return self._generated(busy)

    def _generated(self, seconds: float) -> float:
        tokens = sum(step.response_tokens for step in self.steps)
        return tokens / seconds / self.run.layout.world_size

    def waiting(self, phase: str | None = None) -> dict[str, NDArray[np.float64]]:
        """Share of a phase (or step) in which each stage waits, `[replicas, stages]`.

        `inside`: for other stages of its replica, or for judging; `outside`: for other replicas.
        """
        if phase is None:
            whole = sum(step.total for step in self.steps)
        else:
            whole = sum(step.seconds[phase] for step in self.steps)
        return {
            name: np.sum([s.summed(f"waits_{name}", phase) for s in self.steps], axis=0)
            / max(whole, 1e-12)
            for name in ("inside", "outside")
        }

    @property
    def mean_rows(self) -> float:
        """Sequences of a replica that decode together, over all rounds."""
        return float(np.mean([draw.rounds.mean_rows for draw in self.draws]))

    @property
    def cut_share(self) -> float:
        """`response_length/clip_ratio`: share of responses that end at the limit."""
        limit = self.law.limit
        return float(np.mean([(draw.responses == limit).mean() for draw in self.draws]))


def simulate(scenario: Scenario) -> Simulation:
    """Simulate some steps. The same scenario gives the same numbers.

    Raises:
        UserError: what `planning.run_plan.make_plan` would refuse, or a value that cannot be.
    """
    config = scenario.config
    for name, value in (("--steps", scenario.steps), ("--groups", scenario.groups)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: expected 1 or more")
    if scenario.seed < 0:
        raise UserError(f"--seed {scenario.seed}: expected 0 or more")
    if config.rollout.mode == "speculative":
        raise UserError("rollout.mode=speculative is not simulated; expected `nested` or `full`")
    scenario.stragglers.check()
    run = make_plan(
        config,
        scenario.nodes,
        scenario.gpus_per_node,
        scenario.gpu_memory_gb,
        scenario.hardware,
    )
    layout, assumed = run.layout, run.hardware.assumptions
    law = length_law(
        scenario.lengths,
        mean_response(config, assumed),
        config.rollout.max_new_tokens,
        scenario.length_spread,
        scenario.length_correlation,
    )
    factors = scenario.stragglers.draw(
        np.random.default_rng([scenario.seed, 0]), layout.data, layout.pipeline, layout.tensor
    )
    simulator = StepSimulator(run, factors)
    plans = skip_plans(config, layout)
    draws = tuple(_draw(scenario, run, law, step) for step in range(scenario.steps))
    results = tuple(
        simulator.step(draw, plans[step % len(plans)]) for step, draw in enumerate(draws)
    )
    return Simulation(scenario, run, law, factors, results, draws)


def _draw(scenario: Scenario, run: RunPlan, law: LengthLaw, step: int) -> Draw:
    """Lengths by place in the global batch, so that the layout does not change them."""
    config, layout = scenario.config, run.layout
    rng = np.random.default_rng([scenario.seed, 1, step])
    law_of_prompts = prompt_law(config, run.hardware.assumptions)
    prompts = law_of_prompts.draw(rng, config.rollout.prompts_per_step, 1)[:, 0]
    responses = law.draw(rng, len(prompts), config.rollout.group_size)
    sequences = run.workload.num_sequences
    slots = min(run.slots or run.workload.wanted_slots, sequences)
    rounds = [
        count_rounds(
            own_prompts.tolist(),
            own_responses.tolist(),
            num_slots=slots,
            num_lanes=scenario.groups or layout.pipeline,
            max_num_batched_tokens=config.rollout.max_num_batched_tokens,
            batching=scenario.batching,
        )
        for own_prompts, own_responses in zip(
            np.split(prompts, layout.data), np.split(responses, layout.data), strict=True
        )
    ]
    return Draw(prompts, responses, stack(rounds))


@dataclass(frozen=True)
class Comparison:
    """A changed scenario with the same draws of chance, against the one that was asked for."""

    name: str
    simulation: Simulation
    generation: float
    """How many times as long its generation takes."""
    step: float
    """How many times as long its step takes."""


def compare(simulation: Simulation) -> list[Comparison]:
    """What one change at a time would do."""
    base = simulation.seconds["generation"], simulation.step_seconds[0]
    found = []
    for name, scenario in _variants(simulation):
        other = simulate(scenario)
        generation, step = other.seconds["generation"], other.step_seconds[0]
        found.append(Comparison(name, other, generation / base[0], step / base[1]))
    return found


def _variants(simulation: Simulation) -> Iterator[tuple[str, Scenario]]:
    scenario, stages = simulation.scenario, simulation.run.layout.pipeline
    if simulation.run.gains:
        yield "nothing skipped", scenario.changed({"rollout.mode": "full"})
        if stages > 1:
            law = "uniform" if scenario.config.nested.law == "stage_balanced" else "stage_balanced"
            yield f"plans by the law {law}", scenario.changed({"nested.law": law})
    other: Batching = "static" if scenario.batching == "continuous" else "continuous"
    yield f"{other} batching", replace(scenario, batching=other)
    if scenario.lengths != "fixed":
        yield "all responses of the mean length", replace(scenario, lengths="fixed")
    if scenario.stragglers != Stragglers():
        yield "no stragglers", replace(scenario, stragglers=Stragglers())
    if stages > 1:
        groups = scenario.groups or stages
        for count in sorted({1, stages, 2 * stages} - {groups}):
            yield f"{count} slot groups in flight, not {groups}", replace(scenario, groups=count)
