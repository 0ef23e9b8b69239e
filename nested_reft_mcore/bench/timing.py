"""Seconds of a call: warmed up, repeated until a clock can see it, several times over."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_LEAST_SECONDS = 0.01
"""Of a round: shorter ones would measure the clock."""
_MOST_CALLS = 10_000


@dataclass(frozen=True)
class Measured:
    """A number that was measured in several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Median and extremes of some rounds."""
        return cls(statistics.median(values), min(values), max(values))

    def per_second(self, amount: float) -> Measured:
        """So much of something in these seconds, as a rate: the lowest rate is the longest time."""
        return Measured(amount / self.median, amount / self.high, amount / self.low)


def own_clock() -> Callable[[], float]:
    """A clock for what one process computes by itself.

    With one thread it is the process's own time, which others on a busy machine do not add to.
    """
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds_of(
    action: Callable[[], object],
    device: torch.device,
    num_rounds: int,
    num_calls: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of one call, a number for each round.

    Args:
        action: What is measured. It is called once before anything counts: a first call compiles,
            connects and allocates.
        device: Where it works. On a GPU, events on its stream take the time.
        num_rounds: Rounds.
        num_calls: Calls of each round; left out: as many as a clock needs. Processes that measure
            something together have to state it.
        clock: Where there is no GPU.
    """
    _round(action, device, 1, clock)
    if num_calls is None:
        once = _round(action, device, 1, clock)
        num_calls = max(1, min(_MOST_CALLS, math.ceil(_LEAST_SECONDS / max(once, 1e-9))))
    return [_round(action, device, num_calls, clock) / num_calls for _ in range(num_rounds)]


def _round(
    action: Callable[[], object],
    device: torch.device,
    num_calls: int,
    clock: Callable[[], float],
) -> float:
    if device.type != "cuda":
        started = clock()
        for _ in range(num_calls):
            action()
        return max(clock() - started, 1e-9)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(num_calls):
        action()
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) * 1e-3, 1e-9)
