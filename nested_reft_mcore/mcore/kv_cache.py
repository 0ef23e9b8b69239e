"""Keys and values of all slots, for the layers whose attention a plan runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.mcore.layer_weights import DecodeShape


class KeyValueCache:
    """Rotated keys, and values; a `rollout.decode_model.DecodeCache`."""

    def __init__(
        self,
        plan: LayerSkipPlan,
        layers: Iterable[int],
        shape: DecodeShape,
        num_slots: int,
        length: int,
        like: Tensor,
    ) -> None:
        """Allocate for those of the global `layers` whose attention `plan` runs.

        `like` gives dtype and device.
        """
        self.plan = plan
        """Whose attention it serves; plans that run less may use it too."""
        self.num_slots = num_slots
        self.length = length
        """Positions of each slot."""
        extents = (num_slots, shape.groups, length, shape.head_dim)
        kept = [layer for layer in layers if not plan.skips_attention(layer)]
        # Zeros, not whatever memory holds: masked places get weight 0, but 0 * NaN is NaN.
        self.keys = {layer: like.new_zeros(extents) for layer in kept}
        """By global layer, `[slots, groups, length, head_dim]`."""
        self.values = {layer: like.new_zeros(extents) for layer in kept}
        """By global layer, `[slots, groups, length, head_dim]`."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def clear(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold; what may be NaN there must not reach a later sequence."""
        for slot in slots:
            for tensor in (*self.keys.values(), *self.values.values()):
                tensor[slot].zero_()


def cache_bytes(
    plan: LayerSkipPlan,
    layers: Iterable[int],
    shape: DecodeShape,
    num_slots: int,
    length: int,
    dtype: torch.dtype,
) -> int:
    """What a cache of these arguments takes: two tensors for each layer that attends."""
    attending = sum(not plan.skips_attention(layer) for layer in layers)
    return 2 * attending * num_slots * shape.groups * length * shape.head_dim * dtype.itemsize
