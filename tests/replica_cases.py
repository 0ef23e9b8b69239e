"""Data-parallel replicas as threads of one process, for what they only tell each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar, cast

import pytest
import torch
import torch.distributed as dist

from nested_reft_mcore.launch.context import ParallelContext, ParallelDimension

Result = TypeVar("Result")
ALONE = ParallelDimension(0, 1, (0,))
CONTEXT = ParallelContext(0, 1, 0, torch.device("cpu"), ALONE, ALONE, ALONE)
"""One process."""
PATIENCE_SECONDS = 60.0


def on_replicas(
    num_replicas: int, function: Callable[[ParallelContext], Result], patch: pytest.MonkeyPatch
) -> list[Result]:
    """What `function` returns on each replica; what they gather and add up is exchanged by hand."""
    barrier = Barrier(num_replicas, timeout=PATIENCE_SECONDS)
    box: list[Any] = [None] * num_replicas

    def exchange(value: Any, group: Any) -> list[Any]:
        box[group.rank()] = value
        barrier.wait()
        values = list(box)
        barrier.wait()
        return values

    def gather(gathered: list[Any], value: Any, group: Any) -> None:
        gathered[:] = exchange(value, group)

    def add_up(values: torch.Tensor, group: Any) -> None:
        values.copy_(torch.stack(exchange(values.clone(), group)).sum(dim=0))

    def run(rank: int) -> Result:
        ranks = tuple(range(num_replicas))
        data = ParallelDimension(rank, num_replicas, ranks, cast(Any, _Group(rank)))
        device = torch.device("cpu")
        context = ParallelContext(rank, num_replicas, rank, device, ALONE, ALONE, data)
        try:
            return function(context)
        except BaseException:
            # The others would wait for it.
            barrier.abort()
            raise

    patch.setattr(dist, "all_gather_object", gather)
    patch.setattr(dist, "all_reduce", add_up)
    with ThreadPoolExecutor(num_replicas) as pool:
        return list(pool.map(run, range(num_replicas)))


class _Group:
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank
