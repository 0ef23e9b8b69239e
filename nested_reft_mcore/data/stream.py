"""The order in which a run reads its data: a pure function of (seed, position).

Every process walks the same stream, so the global batch of a step is known everywhere without
communication, and a resumed run reads on where the killed one stopped.
"""

from __future__ import annotations

from nested_reft_mcore.algorithm.counter_random import Stream, permutation
from nested_reft_mcore.config.errors import UserError


class PromptStream:
    """Endless epochs over `num_prompts` items, each shuffled by (seed, epoch).

    A batch may reach over the end of an epoch, and is never shorter than `prompts_per_step`.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int) -> None:
        """ValueError unless both numbers are positive."""
        if num_prompts < 1 or prompts_per_step < 1:
            raise ValueError(
                f"a stream of {num_prompts} prompts, {prompts_per_step} per step: both must be "
                "positive"
            )
        self._num_prompts = num_prompts
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._position = 0
        self._order_of_epoch: tuple[int, list[int]] | None = None

    def next(self) -> list[int]:
        """Indices of the next step's global batch, length `prompts_per_step`."""
        places = range(self._position, self._position + self._prompts_per_step)
        self._position = places.stop
        return [self._index_at(place) for place in places]

    def _index_at(self, place: int) -> int:
        """The item at a place of the endless stream."""
        epoch, offset = divmod(place, self._num_prompts)
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            order = permutation(self._num_prompts, Stream.DATA_ORDER, self._seed, epoch)
            self._order_of_epoch = (epoch, order)
        return self._order_of_epoch[1][offset]

    def state_dict(self) -> dict[str, int]:
        """All that a checkpoint needs: how many items were read, and of which stream."""
        return {
            "position": self._position,
            "num_prompts": self._num_prompts,
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. UserError if it is of another data set or seed.

        `prompts_per_step` may differ: the position counts items.
        """
        if not state:
            raise UserError(
                "the checkpoint has no position in the data: its run replayed rollouts "
                "(rollout.replay); start from its weights with model.checkpoint in a new run_dir"
            )
        for key, expected in (("num_prompts", self._num_prompts), ("seed", self._seed)):
            if state[key] != expected:
                raise UserError(
                    f"the checkpoint was reading data with {key} = {state[key]}, this run has "
                    f"{key} = {expected}; expected the same data file, limits and seed, or "
                    "checkpoint.resume: never"
                )
        self._position = state["position"]


def shard_range(count: int, rank: int, size: int) -> range:
    """The places of a global batch of `count` items that replica `rank` of `size` works on.

    Shards are contiguous, disjoint, cover the batch, and differ in length by at most one.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} replicas")
    return range(count * rank // size, count * (rank + 1) // size)
