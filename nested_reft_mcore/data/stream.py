"""The order in which a run reads its data: a pure function of (seed, position).

Every process walks the same stream, so the global batch of a step is known everywhere without
communication, and a resumed run reads on where the killed one stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nested_reft_mcore.algorithm.counter_random import Stream, permutation
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.mixture import Mixture

_HAS_TO_BE_EQUAL = {
    "num_prompts": "number of prompts (num_prompts)",
    "seed": "seed",
    "quotas": "share of each set of data.train, in places of 1,000,",
    "sizes": "number of prompts of each set of data.train",
    "fingerprint": "fingerprint of all prompts and answers",
}
"""What a checkpoint says of its stream, and what a user calls it."""
_LATER = ("sizes", "fingerprint")


@dataclass(frozen=True)
class Part:
    """A data set within a set of prompts."""

    name: str
    size: int
    """Items; they lie one after the other."""
    weight: float | None = None
    """Share of the stream relative to the others; None: by size. All have one, or none has."""


class PromptStream:
    """Endless epochs over `num_prompts` items, each shuffled by (seed, epoch).

    With weighted parts each part has epochs of its own, and every thousand items hold each part in
    its share. A batch may reach over the end of an epoch, and is never shorter than
    `prompts_per_step`.
    """

    def __init__(
        self,
        num_prompts: int,
        prompts_per_step: int,
        seed: int,
        *,
        parts: Sequence[Part] = (),
        fingerprint: str = "",
    ) -> None:
        """`parts` lie one after the other among the items; without weights they are one set.

        `fingerprint` names the data, so that a checkpoint of other data is refused.

        Raises:
            ValueError: the numbers are not positive.
            UserError: a weight is too small.
        """
        if num_prompts < 1 or prompts_per_step < 1:
            raise ValueError(
                f"a stream of {num_prompts} prompts, {prompts_per_step} per step: both must be "
                "positive"
            )
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._position = 0
        self._fingerprint = fingerprint
        self._sizes = [part.size for part in parts]
        self._mixture: Mixture | None = None
        weights = [part.weight for part in parts if part.weight is not None]
        if weights:
            self._mixture = Mixture([part.name for part in parts], weights, seed)
        self._order_of_epoch: dict[int, tuple[int, list[int]]] = {}

    @property
    def position(self) -> int:
        """Items that were read."""
        return self._position

    def next(self) -> list[int]:
        """Indices of the next step's global batch, length `prompts_per_step`."""
        return self.take(self.prompts_per_step)

    def take(self, count: int) -> list[int]:
        """Indices of the next `count` items."""
        places = range(self._position, self._position + count)
        self._position = places.stop
        return [self._index_at(place) for place in places]

    def _index_at(self, place: int) -> int:
        """The item at a place of the endless stream."""
        if self._mixture is None:
            return self._in_epochs(place, self.num_prompts, 0)
        part, count = self._mixture.locate(place)
        first = sum(self._sizes[:part])
        return first + self._in_epochs(count, self._sizes[part], part, part)

    def _in_epochs(self, place: int, size: int, part: int, *key: int) -> int:
        """The item at a place of endless epochs over `size` items; `key` tells parts apart."""
        epoch, offset = divmod(place, size)
        if part not in self._order_of_epoch or self._order_of_epoch[part][0] != epoch:
            order = permutation(size, Stream.DATA_ORDER, self.seed, epoch, *key)
            self._order_of_epoch[part] = (epoch, order)
        return self._order_of_epoch[part][1][offset]

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs: how many items were read, and of which stream."""
        state: dict[str, Any] = {
            "position": self._position,
            "num_prompts": self.num_prompts,
            "seed": self.seed,
        }
        if self._fingerprint:
            state["fingerprint"] = self._fingerprint
        if self._mixture is not None:
            state["quotas"] = list(self._mixture.quotas)
            state["sizes"] = list(self._sizes)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. UserError if it is of another data set, mixture or seed.

        `prompts_per_step` may differ: the position counts items.
        """
        if not state:
            raise UserError(
                "the checkpoint has no position in the data: its run replayed rollouts "
                "(rollout.replay); start from its weights with model.checkpoint in a new run_dir"
            )
        mine = self.state_dict()
        for key, what in _HAS_TO_BE_EQUAL.items():
            # Older checkpoints have not all of them.
            unknown = key in _LATER and key not in state
            if not unknown and state.get(key) != mine.get(key):
                raise UserError(
                    f"the checkpoint was reading other data: its {what} is {state.get(key)}, this "
                    f"run's is {mine.get(key)}; expected the same data, limits, weights, template "
                    "and seed, or checkpoint.resume: never"
                )
        self._position = state["position"]


def shard_range(count: int, rank: int, size: int) -> range:
    """The places of a global batch of `count` items that replica `rank` of `size` works on.

    Shards are contiguous, disjoint, cover the batch, and differ in length by at most one.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} replicas")
    return range(count * rank // size, count * (rank + 1) // size)
