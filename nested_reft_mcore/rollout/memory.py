"""How many sequences have room for their keys and values at the same time."""

from __future__ import annotations

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rollout.decode_model import DecodeModel

MOST_SLOTS = 256
"""Slots where nothing says otherwise: more rows than this hardly decode faster."""
_SHARE_OF_FREE = 0.5
"""The rest is for activations, and for whatever else the process is going to allocate."""


def choose_num_slots(
    model: DecodeModel,
    plan: LayerSkipPlan,
    length: int,
    num_sequences: int,
    max_slots: int | None,
    kv_cache_bytes: int | None,
) -> int:
    """Slots of `length` positions each, the same number on every process of the model.

    As many as there are sequences, but no more than `max_slots` (256 if it is absent) nor than fit
    into `kv_cache_bytes` on the process that has least room (half of its free memory if absent).
    UserError as in `check_one_fits`.
    """
    needed, room = check_one_fits(model, plan, length, kv_cache_bytes)
    most = min(num_sequences, MOST_SLOTS if max_slots is None else max_slots)
    return model.agree_on_least(min(most, room // needed) if needed else most)


def check_one_fits(
    model: DecodeModel, plan: LayerSkipPlan, length: int, kv_cache_bytes: int | None
) -> tuple[int, int]:
    """The bytes that one sequence of `length` tokens needs on this process, and those it has.

    Every process of the model calls it.

    Raises:
        UserError: not one sequence fits; on every process, with the most that is missing anywhere.
    """
    needed = model.kv_bytes(plan, 1, length)
    room = int(model.free_bytes() * _SHARE_OF_FREE) if kv_cache_bytes is None else kv_cache_bytes
    missing = -model.agree_on_least(room - needed)
    if missing > 0:
        limit = "half of the free memory" if kv_cache_bytes is None else "kv_cache_gb"
        raise UserError(
            f"the keys and values of one sequence of {length} tokens need {needed:,} bytes here, "
            f"and {limit} is {room:,}; {missing:,} are missing on the process with least room. "
            "Lower max_new_tokens, shorten the prompts, spread the model over more processes, or "
            "raise kv_cache_gb"
        )
    return needed, room
