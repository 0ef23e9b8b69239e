"""Which function judges which items in which message to a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_reft_mcore.rewards.base import RewardItem, Scope

CHUNKS_PER_WORKER = 4
"""A batch is cut so that workers which finish early can take more."""
MAX_CHUNK = 256
"""Most items in one message, unless one call has to see more."""


@dataclass(frozen=True)
class Call:
    """One call of one function: what a failure costs."""

    function: int
    """Place of the function in the configuration."""
    items: tuple[int, ...]
    """Places of what it judges, in the batch."""


@dataclass(frozen=True)
class Chunk:
    """Calls that go to one worker in one message."""

    calls: tuple[Call, ...]

    @property
    def items(self) -> tuple[int, ...]:
        """Places in the batch of all that its calls judge, ascending."""
        return tuple(sorted({place for call in self.calls for place in call.items}))


def plan_chunks(
    items: Sequence[RewardItem], scopes: Sequence[Scope], num_workers: int
) -> list[Chunk]:
    """Cut a batch for so many workers: whole groups where a function judges groups.

    Calls that judge the whole batch come first, each on its own, for nobody can help with them.
    """
    everything = tuple(range(len(items)))
    if not everything:
        return []
    batch = [number for number, scope in enumerate(scopes) if scope == "batch"]
    chunks = [Chunk((Call(number, everything),)) for number in batch]
    if len(batch) == len(scopes):
        return chunks
    if "group" in scopes:
        units = groups_of(items)
    else:
        units = [(place,) for place in everything]
    size = min(MAX_CHUNK, -(-len(items) // (num_workers * CHUNKS_PER_WORKER)))
    for places in _fill(units, size):
        calls = [call for unit in places for call in _calls(unit, scopes)]
        chunks.append(Chunk(tuple(calls)))
    return chunks


def groups_of(items: Sequence[RewardItem]) -> list[tuple[int, ...]]:
    """Places of the items of each group, groups in the order in which they begin."""
    groups: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(item.group, []).append(place)
    return [tuple(group) for group in groups.values()]


def _fill(units: Sequence[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    """Runs of units with `size` items each, or a little more."""
    runs: list[list[tuple[int, ...]]] = [[]]
    count = 0
    for unit in units:
        if count >= size:
            runs.append([])
            count = 0
        runs[-1].append(unit)
        count += len(unit)
    return runs


def _calls(unit: tuple[int, ...], scopes: Sequence[Scope]) -> list[Call]:
    """Of one group, or of one item where nobody asks for groups."""
    calls: list[Call] = []
    for number, scope in enumerate(scopes):
        if scope == "item":
            calls += [Call(number, (place,)) for place in unit]
        elif scope == "group":
            calls.append(Call(number, unit))
    return calls
