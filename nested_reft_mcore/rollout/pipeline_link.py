"""Messages between the stages of a decoding pipeline, on torch.distributed alone."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class PipelineLink:
    """This process's neighbours on the ring of stages: one to send to, one to receive from.

    Messages of a pair arrive in the order they were sent, and both sides know their shapes. The
    way from the last stage back to the first may have a group of its own: NCCL puts all messages
    of a communicator in one queue, and with two stages one queue in both directions could block
    itself. With one stage nothing is ever sent.
    """

    def __init__(
        self,
        rank: int = 0,
        ranks: tuple[int, ...] = (0,),
        group: ProcessGroup | None = None,
        return_group: ProcessGroup | None = None,
    ) -> None:
        """`ranks` are the stages' global ranks in order, `rank` this process's place among them."""
        self.rank = rank
        self.num_stages = len(ranks)
        self._ranks = ranks
        self._group = group
        self._return_group = return_group or group
        self.waited_seconds = 0.0
        """Time spent in `receive_previous`; whoever reads it sets it to zero before. Over NCCL a
        receive returns before the message is there, and this stays near zero."""

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds tokens."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage computes logits and samples."""
        return self.rank == self.num_stages - 1

    def send_next(self, message: Tensor) -> Sending:
        """Start sending to the next stage, from the last one to the first, and don't wait."""
        message = message.contiguous()
        work = dist.isend(
            message,
            dst=self._ranks[(self.rank + 1) % self.num_stages],
            group=self._return_group if self.is_last else self._group,
        )
        return Sending(work, message)

    def receive_previous(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The next message of the previous stage, of the last one for the first."""
        message = torch.empty(shape, dtype=dtype, device=device)
        started = time.perf_counter()
        dist.recv(
            message,
            src=self._ranks[self.rank - 1],
            group=self._return_group if self.is_first else self._group,
        )
        self.waited_seconds += time.perf_counter() - started
        return message

    def broadcast_from_last(self, values: Tensor) -> None:
        """Overwrite `values` on every stage with the last stage's."""
        if self.num_stages > 1:
            dist.broadcast(values, src=self._ranks[-1], group=self._group)

    def sum_over_stages(self, values: Tensor) -> None:
        """Overwrite `values` on every stage with their sum over stages."""
        if self.num_stages > 1:
            dist.all_reduce(values, group=self._group)


class Sending:
    """A message under way; it keeps the tensor alive until it has left."""

    def __init__(self, work: dist.Work | None, message: Tensor) -> None:
        self._work = work
        self._message = message

    def wait(self) -> None:
        """Return once the message may be forgotten."""
        if self._work is not None:
            self._work.wait()
