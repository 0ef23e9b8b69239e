"""Micro-batches through a pipeline: 1F1B and interleaved, in the order in which Megatron runs them.

Non-interleaved: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.1; interleaved: 2.2.2. A test
compares both orders with Megatron's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Work(NamedTuple):
    """One pass of one micro-batch through one chunk of a stage."""

    kind: Literal["F", "B"]
    micro_batch: int
    chunk: int


@lru_cache(maxsize=256)
def stage_order(
    num_stages: int, stage: int, num_micro_batches: int, num_chunks: int, *, forward_only: bool
) -> tuple[Work, ...]:
    """What a stage does, one after the other.

    With several chunks `num_micro_batches` is a multiple of `num_stages`, as Megatron demands.
    """
    forwards = [Work("F", m, c) for m, c in _table(num_stages, num_micro_batches, num_chunks)]
    if forward_only:
        return tuple(forwards)
    backwards = [Work("B", m, num_chunks - 1 - c) for _, m, c in forwards]
    warmup = num_stages - stage - 1
    if num_chunks > 1:
        warmup = 2 * warmup + (num_chunks - 1) * num_stages
    warmup = min(warmup, len(forwards))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return tuple(order + backwards[len(forwards) - warmup :])


def _table(num_stages: int, num_micro_batches: int, num_chunks: int) -> list[tuple[int, int]]:
    """Micro-batch and chunk of each forward pass: by groups of as many as there are stages."""
    if num_chunks == 1:
        return [(m, 0) for m in range(num_micro_batches)]
    return [
        (m, chunk)
        for start in range(0, num_micro_batches, num_stages)
        for chunk in range(num_chunks)
        for m in range(start, min(start + num_stages, num_micro_batches))
    ]


@dataclass(frozen=True)
class ScheduleTimes:
    """When a batch has passed through."""

    ends: Array
    """When each stage is done, `[stages, replicas]`."""
    busy: Array
    """Seconds in which it computes, `[stages, replicas]`."""
    items: tuple[tuple[int, Work, Array, Array, Array], ...]
    """Stage, work, when its input was there, start, end; `[replicas]` each."""


def time_schedule(
    forward: Array, backward: Array | None, starts: Array, latency: float = 0.0
) -> ScheduleTimes:
    """Run all stages of all replicas.

    Args:
        forward: Seconds of forward passes, `[stages, chunks, micro_batches, replicas]`.
        backward: Those of backward passes; None: there are none.
        starts: When each replica begins, `[replicas]`.
        latency: Seconds from the end of a pass to its arrival at another stage.
    """
    num_stages, num_chunks, num_micro_batches = forward.shape[:3]
    orders = [
        stage_order(num_stages, stage, num_micro_batches, num_chunks, forward_only=backward is None)
        for stage in range(num_stages)
    ]
    ends: dict[tuple[int, Work], Array] = {}
    free = [starts] * num_stages
    busy = [np.zeros_like(starts) for _ in range(num_stages)]
    places = [0] * num_stages
    items: list[tuple[int, Work, Array, Array, Array]] = []
    remaining = sum(len(order) for order in orders)
    while remaining:
        before = remaining
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                work = order[places[stage]]
                ready = _ready(stage, work, ends, num_stages, num_chunks, starts, latency)
                if ready is None:
                    break
                table = forward if work.kind == "F" or backward is None else backward
                seconds = table[stage, work.chunk, work.micro_batch]
                start = np.maximum(free[stage], ready)
                end = start + seconds
                ends[stage, work] = free[stage] = end
                busy[stage] = busy[stage] + seconds
                items.append((stage, work, ready, start, end))
                places[stage] += 1
                remaining -= 1
        assert remaining < before, "the schedule waits for itself"
    return ScheduleTimes(np.stack(free), np.stack(busy), tuple(items))


def source_of(stage: int, work: Work, num_stages: int, num_chunks: int) -> tuple[int, Work] | None:
    """The pass whose result this one takes; None: it begins with the batch itself."""
    kind, micro_batch, chunk = work
    if kind == "F":
        if stage > 0:
            return stage - 1, work
        return (num_stages - 1, Work("F", micro_batch, chunk - 1)) if chunk > 0 else None
    if stage < num_stages - 1:
        return stage + 1, work
    if chunk < num_chunks - 1:
        return 0, Work("B", micro_batch, chunk + 1)
    return stage, Work("F", micro_batch, chunk)


def _ready(
    stage: int,
    work: Work,
    ends: dict[tuple[int, Work], Array],
    num_stages: int,
    num_chunks: int,
    starts: Array,
    latency: float,
) -> Array | None:
    """When a pass's input is there; None while nobody knows."""
    source = source_of(stage, work, num_stages, num_chunks)
    if source is None:
        return starts
    end = ends.get(source)
    if end is None or source[0] == stage:
        return end
    return end + latency
