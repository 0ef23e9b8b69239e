"""Bytes of every rank: what is always there, and what each part of a step adds."""

from __future__ import annotations

from dataclasses import dataclass

from nested_reft_mcore.config.data import eval_sources
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.activations import UpdateMemory, update_memory
from nested_reft_mcore.planning.generation_memory import CacheMemory, cache_memory
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layer_costs import FLOAT32, Kernels
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.workload import ITEMSIZE, workload_of


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that are there from the first update to the end."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class RankMemory:
    """One rank of a stage; all ranks of a stage need the same of their device."""

    stage: int
    static: StaticMemory
    update: UpdateMemory
    rollout: CacheMemory
    """Under the plan that skips least on this stage."""
    evaluation: CacheMemory | None
    """Full depth; absent where the configuration evaluates nothing."""
    saving: int
    """What gathering a spread optimizer's state takes, on the device."""

    @property
    def moments(self) -> dict[str, int]:
        """Device bytes of each part of a step, what is always there included."""
        found = {
            "update": self.static.total + self.update.total,
            "rollout": self.static.total + self.rollout.total,
        }
        if self.evaluation is not None:
            found["evaluation"] = self.static.total + self.evaluation.total
        found["saving"] = self.static.total + self.saving
        return found

    @property
    def peak(self) -> tuple[str, int]:
        """The part of a step that needs most, and how much."""
        return max(self.moments.items(), key=lambda item: item[1])


def static_memory(config: Config, layout: Layout, stage: int) -> StaticMemory:
    """Weights, gradients and optimizer of a rank, as `mcore.optimizer` sets Megatron up.

    Gradients are float32 in a buffer of their own. AdamW has two float32 moments for each
    parameter and, for bfloat16 weights, a float32 master; the distributed optimizer spreads these
    over the replicas (Rajbhandari et al., arXiv 1910.02054).
    """
    count, itemsize = layout.parameters(stage), ITEMSIZE[config.model.dtype]
    per_parameter = 2 * FLOAT32 + (FLOAT32 if itemsize < FLOAT32 else 0)
    shards = layout.data if config.optimizer.use_distributed_optimizer else 1
    return StaticMemory(
        weights=count * itemsize,
        gradients=count * FLOAT32,
        optimizer=-(-count // shards) * per_parameter,
    )


def rank_memory(
    config: Config, layout: Layout, stage: int, room: int, kernels: Kernels = "fused"
) -> RankMemory:
    """What a rank of `stage` needs of a device that has `room` bytes for it."""
    workload = workload_of(config, layout, kernels)
    static = static_memory(config, layout, stage)
    free = max(0, room - static.total)
    evaluates = bool(eval_sources(config.data)) and config.evaluation.interval > 0
    return RankMemory(
        stage,
        static,
        update_memory(config.model, layout, workload, stage),
        cache_memory(config, layout, workload, stage, free),
        cache_memory(config, layout, workload, stage, free, full_depth=True) if evaluates else None,
        saving=_saving_bytes(config, layout, stage),
    )


def usable_bytes(hardware: HardwareProfile, memory_gb: float | None = None) -> int:
    """Device memory less the reserve for what the model does not count."""
    assumed = hardware.assumptions
    total = (hardware.memory_gb if memory_gb is None else memory_gb) * 1e9
    return int(total * (1 - assumed.fragmentation) - assumed.reserve_gb * 1e9)


def _saving_bytes(config: Config, layout: Layout, stage: int) -> int:
    """Megatron gathers the state of a spread optimizer on every device, one kind at a time."""
    if not config.optimizer.use_distributed_optimizer:
        return 0
    count = layout.parameters(stage)
    return FLOAT32 * (count + -(-count // layout.data))


@dataclass(frozen=True)
class HostMemory:
    """Host bytes of the fullest node, all of its ranks together."""

    reference: int
    """The policy that a KL term pulls toward."""
    saving: int
    """The copy of what is being written."""

    @property
    def total(self) -> int:
        """Both."""
        return self.reference + self.saving


def host_memory(config: Config, layout: Layout) -> HostMemory:
    """What the fullest node's host memory holds beside the processes themselves."""
    num_nodes = -(-layout.world_size // layout.gpus_per_node)
    has_reference = config.algorithm.kl_loss_coef > 0 or config.algorithm.kl_reward_coef > 0
    nodes = []
    for node in range(num_nodes):
        ranks = layout.ranks_of_node(node)
        weights = sum(static_memory(config, layout, stage).weights for _, stage in ranks)
        saving = sum(_host_saving(config, layout, *rank) for rank in ranks)
        nodes.append(HostMemory(weights if has_reference else 0, saving))
    return max(nodes, key=lambda node: node.total)


def _host_saving(config: Config, layout: Layout, replica: int, stage: int) -> int:
    """Of one rank. The first replica writes; a spread optimizer's state is gathered by all.

    The gathered state is on the host already, and a save in the background copies it once more.
    """
    static, is_writer = static_memory(config, layout, stage), replica == 0
    if not config.optimizer.use_distributed_optimizer:
        return static.weights + static.optimizer if is_writer else 0
    # Megatron gathers masters and both moments, whatever the type of the weights.
    gathered = 3 * FLOAT32 * layout.parameters(stage)
    if not is_writer:
        return gathered
    copied = gathered if config.checkpoint.async_save else 0
    return gathered + copied + static.weights
