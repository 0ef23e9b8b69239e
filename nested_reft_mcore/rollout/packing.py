"""Which sequences share a micro-batch: as few padded places as possible, and even work.

Pure functions of lengths, so that every process finds the same answer without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from nested_reft_mcore.config.errors import UserError


def deal_rows(lengths: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Rows of each replica, in order, so that replicas have about equally many tokens.

    The longest row that is left goes to the replica with the fewest tokens; each gets a row where
    there are enough of them.
    """
    dealt: list[list[int]] = [[] for _ in range(num_replicas)]
    loads = [(0, replica) for replica in range(num_replicas)]
    for row in _longest_first(lengths):
        load, replica = heappop(loads)
        dealt[replica].append(row)
        heappush(loads, (load + lengths[row], replica))
    return [sorted(rows) for rows in dealt]


def num_micro_batches(lengths: Sequence[int], max_tokens: int, multiple: int = 1) -> int:
    """The fewest micro-batches of at most `max_tokens` places, padding included.

    Args:
        lengths: Tokens of each row, at least 1.
        max_tokens: Rows times the longest of them, rounded up to `multiple`, in a micro-batch.
        multiple: Of the length of a micro-batch.

    Raises:
        UserError: the longest row does not fit.
    """
    longest = round_up(max(lengths), multiple)
    if longest > max_tokens:
        raise UserError(
            f"train.max_tokens_per_micro_batch={max_tokens}: a sequence (prompt and response) "
            f"takes {longest} tokens; expected at least that many"
        )
    return len(_pack(lengths, max_tokens, multiple))


def fill_micro_batches(
    lengths: Sequence[int], max_tokens: int, num_wanted: int, multiple: int = 1
) -> list[list[int]]:
    """Rows of `num_wanted` micro-batches of at most `max_tokens` places, the fullest kept small.

    Rows of like lengths lie together. `num_wanted` is at least `num_micro_batches(...)`; where
    there are fewer rows the last micro-batches are empty.
    """
    low, high = round_up(max(lengths), multiple), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_pack(lengths, middle, multiple)) <= num_wanted:
            high = middle
        else:
            low = middle + 1
    packed = _pack(lengths, low, multiple)
    # The fullest first; its halves take its place.
    heap = [(-_places(rows, lengths, multiple), number) for number, rows in enumerate(packed)]
    heap = [entry for entry in heap if len(packed[entry[1]]) > 1]
    heapify(heap)
    while heap and len(packed) < num_wanted:
        _, number = heappop(heap)
        rows = packed[number]
        middle = len(rows) // 2
        packed[number], added = rows[:middle], rows[middle:]
        packed.append(added)
        for place in (number, len(packed) - 1):
            if len(packed[place]) > 1:
                heappush(heap, (-_places(packed[place], lengths, multiple), place))
    return packed + [[] for _ in range(num_wanted - len(packed))]


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def _pack(lengths: Sequence[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """From the longest row on, as many rows as fit: no other order needs fewer micro-batches."""
    packed: list[list[int]] = []
    room = 0
    for row in _longest_first(lengths):
        if room == 0:
            packed.append([])
            room = max_tokens // round_up(lengths[row], multiple)
        packed[-1].append(row)
        room -= 1
    return packed


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def _places(rows: Sequence[int], lengths: Sequence[int], multiple: int) -> int:
    return len(rows) * round_up(lengths[rows[0]], multiple)
