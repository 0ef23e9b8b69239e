"""The plan of a run: does it fit, what would help, and how long a step takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nested_reft_mcore.config.checks import (
    check_architecture,
    check_batches,
    check_depth,
    check_for_training,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.hf.config import model_architecture, model_source
from nested_reft_mcore.planning.advice import Advice, Judgement, advise
from nested_reft_mcore.planning.hardware import (
    DEFAULT_HARDWARE,
    HardwareProfile,
    load_hardware,
)
from nested_reft_mcore.planning.layer_costs import Kernels
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.memory import (
    HostMemory,
    RankMemory,
    host_memory,
    rank_memory,
    usable_bytes,
)
from nested_reft_mcore.planning.skip_gain import SkipGain, skip_gains, skip_plans
from nested_reft_mcore.planning.step_time import StepModel, StepTime
from nested_reft_mcore.planning.workload import Workload, workload_of


@dataclass(frozen=True)
class RunPlan:
    """What a configuration needs of some machines, and what they would make of it."""

    config: Config
    layout: Layout
    hardware: HardwareProfile
    memory_gb: float
    """Of a device, in 10^9 bytes."""
    room: int
    """What of it may be used, in bytes."""
    workload: Workload
    ranks: tuple[RankMemory, ...]
    """One of each pipeline stage."""
    host: HostMemory
    time: StepTime
    gains: tuple[SkipGain, ...]
    head_cost: float
    """Of the vocabulary head, in layers, as `nested.head_cost` wants it."""
    advice: tuple[Advice, ...]
    """Empty where the plan fits."""

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.peak[1])

    @property
    def slots(self) -> int:
        """Sequences that all ranks have room for together; 0 where not one fits."""
        return min(rank.rollout.slots for rank in self.ranks)

    @property
    def problems(self) -> list[str]:
        """What does not fit; empty where all does."""
        return find_problems(self.ranks, self.room, self.host, self.hardware)

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return not self.problems


def make_plan(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    gpu_memory_gb: float | None = None,
    hardware: HardwareProfile | str = DEFAULT_HARDWARE,
) -> RunPlan:
    """Plan a run of `train` with one process per GPU.

    Args:
        config: Checked; where `model.hf_path` or `model.checkpoint` is set, its directory says
            what the model's shape is. Weights are not read.
        nodes: Machines.
        gpus_per_node: GPUs of each.
        gpu_memory_gb: Memory of each in 10^9 bytes; left out: the profile's.
        hardware: A profile, or the name or file of one.

    Raises:
        UserError: what `train` would refuse: the layout does not fit model or machines, batches do
            not fit replicas, a micro-batch has no room; the message names the option.
    """
    if isinstance(hardware, str):
        hardware = load_hardware(hardware)
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise UserError(f"{name}={value}: expected 1 or more")
    memory_gb = hardware.memory_gb if gpu_memory_gb is None else gpu_memory_gb
    room = _room(hardware, memory_gb)
    check_for_training(config)
    architecture = model_architecture(config.model)
    check_architecture(architecture, model_source(config.model))
    check_depth(config, architecture.num_layers)
    layout = Layout.of(architecture, config.parallel, nodes, gpus_per_node)
    check_batches(config, layout.data)
    workload = workload_of(config, layout, hardware.kernels)
    ranks, host = _memory(config, layout, room, hardware.kernels), host_memory(config, layout)
    advice: Sequence[Advice] = ()
    if find_problems(ranks, room, host, hardware):

        def judge(other: Config, num_nodes: int) -> Judgement:
            changed = Layout.of(architecture, other.parallel, num_nodes, gpus_per_node)
            needed = _memory(other, changed, room, hardware.kernels)
            fits = not find_problems(needed, room, host_memory(other, changed), hardware)
            return fits, max(rank.peak[1] for rank in needed)

        advice = advise(config, architecture, nodes, gpus_per_node, judge)
    # Where nothing fits the times are those of a machine that had the room.
    slots = min(rank.rollout.slots for rank in ranks) or workload.wanted_slots
    model = StepModel(config, layout, workload, hardware, slots)
    return RunPlan(
        config,
        layout,
        hardware,
        memory_gb,
        room,
        workload,
        ranks,
        host,
        model.step(skip_plans(config, layout)),
        tuple(skip_gains(config, layout, model)),
        model.decode.head_cost(),
        tuple(advice),
    )


def _room(hardware: HardwareProfile, memory_gb: float) -> int:
    """Bytes of each GPU that a run may use; UserError if there are none."""
    room = usable_bytes(hardware, memory_gb) if math.isfinite(memory_gb) else 0
    if room <= 0:
        raise UserError(
            f"--gpu-memory {memory_gb:g}: nothing is left of it after the reserve of "
            f"{hardware.assumptions.reserve_gb:g} GB; expected more (in 10^9 bytes)"
        )
    return room


def find_problems(
    ranks: Sequence[RankMemory], room: int, host: HostMemory, hardware: HardwareProfile
) -> list[str]:
    """What of a plan does not fit, one sentence each."""
    found = []
    for moment in ("update", "rollout", "evaluation", "saving"):
        needed = {rank.stage: rank.moments.get(moment, 0) for rank in ranks}
        stage = max(needed, key=lambda stage: needed[stage])
        if needed[stage] > room:
            short = (needed[stage] - room) / 1e9
            found.append(
                f"{moment}: stage {stage} needs {needed[stage] / 1e9:.1f} GB, "
                f"{short:.1f} GB more than there is"
            )
    if not found and any(rank.rollout.slots == 0 for rank in ranks):
        found.append("rollout: not one sequence's keys and values fit into rollout.kv_cache_gb")
    limit = hardware.host_memory_gb
    if limit is not None and host.total > limit * 1e9:
        found.append(
            f"host memory: a node needs {host.total / 1e9:.0f} GB, and has {limit:.0f} GB; "
            "checkpoint.async_save=false does without one copy"
        )
    return found


def _memory(config: Config, layout: Layout, room: int, kernels: Kernels) -> tuple[RankMemory, ...]:
    stages = range(layout.pipeline)
    return tuple(rank_memory(config, layout, stage, room, kernels) for stage in stages)
