"""The policy that a KL term pulls toward: the weights that the run began with.

They wait in host memory, this process's share of them, and change places with the policy's own for
as long as a forward pass needs them: one host copy holds whichever are not in use, and the device
never holds two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nested_reft_mcore.mcore.model import Policy

_PIECE = 2**24
"""Elements that change places at once: what the exchange needs of device memory."""


class ReferencePolicy:
    """The policy as it is when this is made; `in_place` brings it back for a while."""

    def __init__(self, policy: Policy) -> None:
        """Copy every parameter of this process to host memory, pinned where there is CUDA."""
        policy.sync_parameters()
        self._policy = policy
        is_pinned = policy.context.device.type == "cuda"
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                away = torch.empty(
                    parameter.numel(), dtype=parameter.dtype, device="cpu", pin_memory=is_pinned
                )
                away.copy_(parameter.detach().reshape(-1))
                self._pairs.append((parameter, away))

    @contextmanager
    def in_place(self) -> Iterator[Policy]:
        """The policy with the reference's weights; its own are back afterwards, bit for bit.

        Every process calls it. Checkpoints and updates are refused meanwhile.

        Raises:
            RuntimeError: the reference is in place already.
        """
        policy = self._policy
        if policy.is_replaced:
            raise RuntimeError("the reference policy is in place already")
        # Values that the distributed optimizer has yet to gather would arrive on top.
        policy.sync_parameters()
        exchanged: list[tuple[Tensor, Tensor]] = []
        policy.is_replaced = True
        try:
            for pair in self._pieces():
                _exchange(*pair)
                exchanged.append(pair)
            yield policy
        finally:
            # So would the reference's, if its forward pass began to gather.
            policy.sync_parameters()
            for pair in reversed(exchanged):
                _exchange(*pair)
            policy.is_replaced = False

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Views into the parameters, which may be views into a buffer of Megatron's, and copies."""
        for parameter, away in self._pairs:
            here = parameter.detach().view(-1)
            yield from zip(here.split(_PIECE), away.split(_PIECE), strict=True)


@torch.no_grad()
def _exchange(here: Tensor, there: Tensor) -> None:
    """Swap the values in place."""
    kept = here.clone()
    # On CUDA both are in the order of one stream.
    here.copy_(there, non_blocking=True)
    there.copy_(kept, non_blocking=True)
