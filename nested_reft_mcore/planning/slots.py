"""Who decodes in which round: the rules of `rollout.scheduler`, in jumps.

Rounds are logical. Which completion sits where depends on lengths alone, not on how long a pass
takes, so one count of rounds serves any machine, plan and straggler. Where nothing ends and no
prompt waits, all rounds up to the next end are one stretch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Batching = Literal["continuous", "static"]
"""As `rollout.scheduler`; a test holds both equal round by round."""


@dataclass(frozen=True)
class Rounds:
    """A replica's generation; the second axis is the lane (slot group)."""

    count: NDArray[np.int64]
    """Rounds of each stretch, `[stretches]`."""
    rows: NDArray[np.int64]
    """Sequences that decode, `[stretches, lanes]`."""
    keys: NDArray[np.float64]
    """Places that they look at together, the mean over the stretch, `[stretches, lanes]`."""
    piece_tokens: NDArray[np.int64]
    """Tokens of prompts that are written in each round, `[stretches, lanes]`."""
    piece_pairs: NDArray[np.int64]
    """Places that each of these looks at, summed, `[stretches, lanes]`."""

    @property
    def decoded_tokens(self) -> int:
        """Tokens that passes decode, those of finished rows included."""
        return int((self.count[:, None] * self.rows).sum())

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of prompts, each prompt once, without its last one."""
        return int((self.count[:, None] * self.piece_tokens).sum())


@dataclass
class _Prefix:
    lane: int
    length: int
    filled: int = 0


@dataclass
class _Lane:
    number: int
    slots: int
    held: int = 0
    """Slots that are taken."""
    waiting: list[tuple[_Prefix, int]] = field(default_factory=list)
    """Prefix and length of rows that do not decode yet."""
    ends: list[tuple[int, int]] = field(default_factory=list)
    """Heap: round in which a row has ended, and its places then."""
    rows: int = 0
    growing: int = 0
    """Rows whose completion is not finished."""
    keys: int = 0

    def release(self, number: int, batching: Batching) -> None:
        """Let go of what has ended before round `number`; static lanes wait for all their rows."""
        while self.ends and self.ends[0][0] <= number:
            _, places = heappop(self.ends)
            self.growing -= 1
            if batching == "continuous":
                self.rows, self.held = self.rows - 1, self.held - 1
                self.keys -= places
            else:
                # It decodes its last token again and again.
                self.keys -= 1
        if batching == "static" and not self.growing and not self.waiting:
            self.rows = self.held = self.keys = 0


class _Replica:
    """Lanes of one replica and the queue that they draw from."""

    def __init__(
        self,
        prompts: Sequence[int],
        responses: Sequence[Sequence[int]],
        batching: Batching,
        max_num_batched_tokens: int,
    ) -> None:
        self._prompts = prompts
        self._queue = deque(
            (prompt, length) for prompt, group in enumerate(responses) for length in group
        )
        self._batching: Batching = batching
        self._budget = max_num_batched_tokens
        self._current: tuple[int, _Prefix] | None = None

    @property
    def has_queue(self) -> bool:
        return bool(self._queue)

    def admit(self, lane: _Lane) -> None:
        """Give free slots to those who wait."""
        if self._batching == "static" and lane.held:
            return
        while lane.held < lane.slots and self._queue:
            prompt, length = self._queue.popleft()
            if self._current is None or self._current[0] != prompt:
                self._current = (prompt, _Prefix(lane.number, self._prompts[prompt] - 1))
            lane.waiting.append((self._current[1], length))
            lane.held += 1

    def fill(self, lane: _Lane) -> tuple[int, int]:
        """Tokens and pairs of the prompts' pieces that this lane writes in this round."""
        budget = left = max(1, self._budget - lane.held)
        pairs = 0
        for prefix, _ in lane.waiting:
            if prefix.lane != lane.number or prefix.filled == prefix.length:
                continue
            taken = min(prefix.length - prefix.filled, left)
            if taken == 0:
                break
            pairs += taken * prefix.filled + taken * (taken + 1) // 2
            prefix.filled += taken
            left -= taken
        return budget - left, pairs

    def start(self, lane: _Lane, number: int) -> None:
        """Let rows decode whose prompt is there."""
        still = []
        for prefix, length in lane.waiting:
            if prefix.filled < prefix.length:
                still.append((prefix, length))
                continue
            heappush(lane.ends, (number + length, prefix.length + 1 + length))
            lane.rows, lane.growing = lane.rows + 1, lane.growing + 1
            lane.keys += prefix.length + 1
        lane.waiting = still


def count_rounds(
    prompts: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    num_slots: int,
    num_lanes: int,
    max_num_batched_tokens: int,
    batching: Batching = "continuous",
) -> Rounds:
    """The rounds that a replica takes for its completions.

    Args:
        prompts: Tokens of each prompt, at least 1.
        responses: For each prompt the tokens of its samples, at least 1 each.
        num_slots: Sequences that are decoded together, over all lanes.
        num_lanes: Slot groups in flight; no more than slots are made.
        max_num_batched_tokens: Of a lane's pass; one token of each row always runs.
        batching: Whether a finished sequence's slot goes to the next one at once.
    """
    num_lanes = min(num_lanes, num_slots)
    ends = [num_slots * (lane + 1) // num_lanes for lane in range(num_lanes)]
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    lanes = [_Lane(number, size) for number, size in enumerate(sizes)]
    replica = _Replica(prompts, responses, batching, max_num_batched_tokens)
    number = 0
    counts: list[int] = []
    loads: list[list[tuple[int, float, int, int]]] = []
    while True:
        load, is_filling, next_end = [], False, None
        for lane in lanes:
            lane.release(number, batching)
            if replica.has_queue:
                replica.admit(lane)
            pieces = pairs = 0
            if lane.waiting:
                pieces, pairs = replica.fill(lane)
                replica.start(lane, number)
                is_filling = True
            if lane.ends and (next_end is None or lane.ends[0][0] < next_end):
                next_end = lane.ends[0][0]
            load.append((lane.rows, lane.keys, pieces, pairs))
        if next_end is None and not is_filling:
            break
        count = 1 if is_filling or next_end is None else next_end - number
        half = (count - 1) / 2
        for place, lane in enumerate(lanes):
            rows, keys, pieces, pairs = load[place]
            load[place] = (rows, keys + half * lane.growing, pieces, pairs)
            lane.keys += count * lane.growing
        counts.append(count)
        loads.append(load)
        number += count
    table = np.asarray(loads, dtype=np.float64).reshape(len(counts), num_lanes, 4)
    rows, pieces, pairs = (table[..., column].astype(np.int64) for column in (0, 2, 3))
    return Rounds(np.asarray(counts, dtype=np.int64), rows, table[..., 1], pieces, pairs)
