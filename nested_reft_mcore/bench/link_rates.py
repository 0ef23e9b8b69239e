"""All-reduces and messages between processes, by size: within a node, and between nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nested_reft_mcore.bench.timing import Measured, seconds_of
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import barrier

Place = Literal["node", "network"]
_SIZES = (8, 2**10, 2**16, 2**20, 2**24)
_GPU_SIZES = (*_SIZES, 2**28)
_QUICK_SIZES = (8, 2**16)
_BYTES_OF_A_ROUND = 2**26
_MOST_CALLS = 50


@dataclass(frozen=True)
class LinkRate:
    """One operation with one size."""

    place: Place
    what: str
    """`all-reduce`, or `message`: half of the way there and back."""
    processes: int
    num_bytes: int
    seconds: Measured
    rate: Measured
    """Bytes a second that each process sends: 2 (n - 1) / n times the tensor in an all-reduce."""


@dataclass(frozen=True)
class Circle:
    """Processes that are measured together."""

    place: Place
    ranks: tuple[int, ...]
    group: ProcessGroup


def make_circles(context: ParallelContext) -> list[Circle]:
    """This process's node, and its counterparts on other nodes; every process calls it.

    Torch wants all processes to make all groups, in one order. Ranks of a node are consecutive.
    """
    size, world = context.local_world_size, context.world_size
    nodes = [range(first, min(first + size, world)) for first in range(0, world, size)]
    mine = _circles("node", nodes, context.rank)
    return mine + _circles("network", [range(n, world, size) for n in range(size)], context.rank)


def _circles(place: Place, every: Sequence[Sequence[int]], rank: int) -> list[Circle]:
    found = []
    for ranks in every:
        if len(ranks) == 1:
            continue
        group = dist.new_group(list(ranks))
        if rank in ranks:
            assert isinstance(group, ProcessGroup), "this process is in it"
            found.append(Circle(place, tuple(ranks), group))
    return found


def measure_circles(
    circles: Sequence[Circle], context: ParallelContext, quick: bool, num_rounds: int
) -> list[LinkRate]:
    """As this process has seen it. All circles of a kind work at the same time, as in training."""
    sizes = _GPU_SIZES if context.device.type == "cuda" else _SIZES
    found = []
    for circle in circles:
        for size in _QUICK_SIZES if quick else sizes:
            found.append(_all_reduce(circle, size, context, num_rounds))
            found.append(_message(circle, size, context, num_rounds))
    return found


def _all_reduce(circle: Circle, size: int, context: ParallelContext, num_rounds: int) -> LinkRate:
    values = torch.zeros(max(1, size // 4), device=context.device)
    seconds = _together(
        lambda: dist.all_reduce(values, group=circle.group), size, context, num_rounds
    )
    count = len(circle.ranks)
    sent = 2 * (count - 1) / count * size
    return LinkRate(circle.place, "all-reduce", count, size, seconds, seconds.per_second(sent))


def _message(circle: Circle, size: int, context: ParallelContext, num_rounds: int) -> LinkRate:
    """Pairs of neighbours play ping-pong; who has no neighbour waits."""
    place = circle.ranks.index(context.rank)
    other = place ^ 1
    values = torch.zeros(max(1, size // 4), device=context.device)

    def there_and_back() -> None:
        if other >= len(circle.ranks):
            return
        turns = (dist.send, dist.recv) if place < other else (dist.recv, dist.send)
        for turn in turns:
            turn(values, circle.ranks[other], group=circle.group)

    both = _together(there_and_back, size, context, num_rounds)
    seconds = Measured(both.median / 2, both.low / 2, both.high / 2)
    return LinkRate(circle.place, "message", 2, size, seconds, seconds.per_second(size))


def _together(
    action: Callable[[], object], size: int, context: ParallelContext, num_rounds: int
) -> Measured:
    barrier()
    num_calls = max(1, min(_MOST_CALLS, _BYTES_OF_A_ROUND // max(size, 1)))
    return Measured.of(seconds_of(action, context.device, num_rounds, num_calls))
