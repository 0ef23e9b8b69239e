"""Numbers that live on data-parallel replicas, brought together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nested_reft_mcore.launch.context import ParallelContext

Value = TypeVar("Value")


def gather_from_replicas(value: Value, context: ParallelContext) -> list[Value]:
    """The value of every data-parallel replica, in order, on every process."""
    if context.data.group is None:
        return [value]
    gathered: list[Any] = [None] * context.data.size
    dist.all_gather_object(gathered, value, group=context.data.group)
    return gathered


def add_up(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def any_process(flags: Sequence[bool], context: ParallelContext) -> list[bool]:
    """Whether each flag is set on at least one process; the same answer on all."""
    if context.world_size == 1:
        return list(flags)
    votes = torch.tensor([int(flag) for flag in flags], device=context.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def any_in_replica(flag: bool, context: ParallelContext) -> bool:
    """Whether `flag` is set on a process of this replica; the same answer on all of them."""
    groups = [d.group for d in (context.tensor, context.pipeline) if d.group is not None]
    if not groups:
        return flag
    vote = torch.tensor([int(flag)], device=context.device)
    for group in groups:
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=group)
    return bool(vote.item())


def is_replica_writer(context: ParallelContext) -> bool:
    """Whether this process writes files for its replica: one process of each does."""
    return context.tensor.rank == 0 and context.pipeline.rank == 0


def broadcast_in_replica(value: Value, context: ParallelContext) -> Value:
    """Give every process of a replica the object of its writer (`is_replica_writer`)."""
    for dimension in (context.pipeline, context.tensor):
        if dimension.group is not None:
            box: list[Any] = [value]
            dist.broadcast_object_list(
                box, src=dimension.ranks[0], group=dimension.group, device=context.device
            )
            value = box[0]
    return value
