"""Who this process is: what the launcher said, and the groups that Megatron-Core made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nested_reft_mcore.launch.lifeline import Lifeline

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

Launcher = Literal["torchrun", "mpirun", "srun", "local", "single"]


@dataclass(frozen=True)
class RankInfo:
    """One process as its launcher numbers it.

    mpirun's environment holds no address: there `master_addr` is empty and `master_port` 0 until
    `launch.mpi.MpiWorld` has found them.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: Launcher


@dataclass(frozen=True)
class ParallelDimension:
    """This process's place along one dimension of parallelism."""

    rank: int
    size: int
    ranks: tuple[int, ...]
    """Global ranks of the group, in group order."""
    group: ProcessGroup | None = None
    """Absent where `size` is 1: there is nobody to talk to."""


@dataclass(frozen=True)
class ParallelContext:
    """Groups, ranks and device, built once by `mcore.initialize` and handed down."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor: ParallelDimension
    pipeline: ParallelDimension
    data: ParallelDimension
    num_chunks: int = 1
    """Model chunks of this process: virtual pipeline size, or 1."""
    local_world_size: int = 1
    """Processes on this machine."""
    lifeline: Lifeline = field(default_factory=Lifeline)
    """What this process tells the others of itself, where they watch over each other."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this process embeds tokens."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes logits."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for everybody."""
        return self.rank == 0
