"""When each pass of a generation starts and ends on every stage.

A stage takes its items in order: round, then virtual chunk, then lane. An item starts when the
stage is free and its input is there: hidden states from the stage before, or for the first chunk
the token that the last stage sampled in the lane's round before. Nobody waits while sending.

That is a linear system in the max-plus algebra (Baccelli et al., Synchronization and Linearity,
1992): with passes that take equally long in every round of a stretch, n rounds are the n-th power
of one round's matrix, and squaring makes it in log2 n products. So a stretch costs little however
long it is, and nothing is assumed about a steady state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_NEVER = -np.inf
_FEW_ROUNDS = 3
"""Up to so many rounds are walked through; more are a power of a matrix."""


@dataclass(frozen=True)
class Passes:
    """Seconds of every pass; replicas with fewer stretches have stretches of 0 rounds behind."""

    count: NDArray[np.int64]
    """Rounds, `[replicas, stretches]`."""
    seconds: Array
    """`[replicas, stretches, stages, chunks, lanes]`."""
    messages: Array
    """From one stage to the next, `[replicas, stretches, lanes]`; 0 with one stage."""
    active: NDArray[np.bool_]
    """Lanes that have a pass at all, `[replicas, stretches, lanes]`."""

    def of(self, replica: int) -> Passes:
        """One replica alone."""
        one = slice(replica, replica + 1)
        return Passes(self.count[one], self.seconds[one], self.messages[one], self.active[one])

    @property
    def busy(self) -> Array:
        """Seconds in which each stage computes, `[replicas, stages]`."""
        per_round = self.seconds.sum(axis=(3, 4))
        return (self.count[..., None] * per_round).sum(axis=1)


@dataclass(frozen=True)
class Item:
    """One pass of a lane on a stage; or a stretch of rounds that was not walked through."""

    stage: int
    start: float
    end: float
    name: str
    lane: int
    """-1: all lanes."""
    round: int
    num_rounds: int
    chunk: int
    ready: float
    """When its input was there."""
    busy: float
    """Seconds of it in which the stage computes."""


def time_passes(passes: Passes) -> Array:
    """Seconds until each stage has done its last pass, `[replicas, stages]`."""
    num_replicas, num_stretches, num_stages, _, num_lanes = passes.seconds.shape
    if num_stages == 1:
        return passes.busy
    state = np.zeros((num_stages + num_lanes, num_replicas))
    for stretch in range(num_stretches):
        one = _Round(passes, stretch)
        state = one.repeated(state, passes.count[:, stretch])
    return state[:num_stages].T.copy()


class _Round:
    """One round of a stretch, for all replicas.

    A state is `[stages + lanes, ...]`: when each stage is free, when each lane's token is there.
    """

    def __init__(self, passes: Passes, stretch: int) -> None:
        # Replicas last: they run along in every operation.
        self._seconds = passes.seconds[:, stretch].transpose(1, 2, 3, 0)
        self._messages = passes.messages[:, stretch].T
        self._active = passes.active[:, stretch].T
        self._all_active = bool(self._active.all())

    def once(self, state: Array, items: list[Any] | None = None) -> Array:
        """The state a round later; `items` takes stage, chunk, lane, ready, start, end."""
        num_stages, num_chunks, num_lanes = self._seconds.shape[:3]
        state = state.copy()
        free = state[:num_stages]
        tail = (slice(None),) + (None,) * (state.ndim - 2)
        for chunk in range(num_chunks):
            for lane in range(num_lanes):
                if not self._active[lane].any():
                    continue
                there = state[num_stages + lane].copy()
                message = self._messages[lane][tail]
                is_active = self._active[lane][tail]
                for stage in range(num_stages):
                    # A lane that has nothing waits for nothing, and takes no time.
                    ready = there if self._all_active else np.where(is_active, there, _NEVER)
                    start = np.maximum(free[stage], ready)
                    end = start + self._seconds[stage, chunk, lane][tail]
                    if items is not None:
                        items.append((stage, chunk, lane, ready, start, end))
                    free[stage] = end
                    there = end + message
                if self._all_active:
                    state[num_stages + lane] = there
                else:
                    state[num_stages + lane] = np.where(is_active, there, state[num_stages + lane])
        return state

    def repeated(self, state: Array, counts: NDArray[np.int64]) -> Array:
        """The state `counts` rounds later, a number for each replica."""
        left = counts.copy()
        if left.max(initial=0) <= _FEW_ROUNDS:
            for done in range(int(left.max(initial=0))):
                state = np.where(left > done, self.once(state), state)
            return state
        matrix = self._matrix(len(state))
        vector = state.T
        while True:
            moved = (matrix + vector[:, None, :]).max(axis=2)
            vector = np.where((left % 2 == 1)[:, None], moved, vector)
            left //= 2
            if not left.any():
                return vector.T.copy()
            matrix = (matrix[:, :, :, None] + matrix[:, None, :, :]).max(axis=2)

    def _matrix(self, size: int) -> Array:
        """`[replicas, size, size]`: how much later than state j state i is a round on, at least."""
        unit = np.full((size, size), _NEVER)
        np.fill_diagonal(unit, 0.0)
        num_replicas = self._seconds.shape[3]
        start = np.repeat(unit[:, None, :], num_replicas, axis=1)
        return self.once(start).transpose(1, 0, 2)


def record_passes(passes: Passes, replica: int, walked: int | None = 2) -> list[Item]:
    """What a replica's stages do, in seconds from the start of its generation.

    Args:
        passes: Of all replicas.
        replica: Which one.
        walked: Rounds of each stretch that are shown pass by pass; the others are one item on
            each stage. None: all.
    """
    one = passes.of(replica)
    num_stages, num_lanes = one.seconds.shape[2], one.seconds.shape[4]
    state = np.zeros((num_stages + num_lanes, 1))
    found: list[Item] = []
    number = 0
    for stretch, count in enumerate(one.count[0].tolist()):
        step = _Round(one, stretch)
        shown = count if walked is None else min(count, walked)
        for offset in range(shown):
            items: list[Any] = []
            state = step.once(state, items)
            found += _walked(items, step, number + offset)
        if shown < count:
            before, rest = state, count - shown
            state = step.repeated(state, np.asarray([rest]))
            per_round = one.seconds[0, stretch].sum(axis=(1, 2))
            for stage in range(num_stages):
                start, end = float(before[stage, 0]), float(state[stage, 0])
                busy = float(rest * per_round[stage])
                if busy == 0.0:
                    continue
                first = number + shown
                found.append(Item(stage, start, end, "decode", -1, first, rest, -1, start, busy))
        number += count
    return found


def _walked(items: Sequence[Any], step: _Round, number: int) -> list[Item]:
    found = []
    for stage, chunk, lane, ready, start, end in items:
        begin, done = float(start[0]), float(end[0])
        if not step._active[lane, 0]:
            continue
        found.append(
            Item(stage, begin, done, "pass", lane, number, 1, chunk, float(ready[0]), done - begin)
        )
    return found
