"""Pipeline messages whose shape changes from one micro-batch to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nested_reft_mcore.mcore.model import Policy


@contextmanager
def variable_lengths(policy: Policy) -> Iterator[dict[str, Any]]:
    """Let stages tell each other shapes as long as this lasts; gives arguments of the schedule."""
    config: Any = policy.transformer_config
    config.variable_seq_lengths = True
    try:
        yield _interleaved_groups(config) if policy.context.num_chunks > 1 else {}
    finally:
        config.variable_seq_lengths = False


class _OrderedCommunicator(P2PCommunicator):
    """Sends shapes in the order in which Megatron sends tensors one by one.

    Its own batched exchange of shapes mixes up the messages to and from one process where the
    previous stage is also the next one, as in the interleaved schedule on two stages.
    """

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        def shape_of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else _shape_message(list(tensor.shape))

        from_prev = _shape_message([0, 0, 0]) if recv_prev else None
        from_next = _shape_message([0, 0, 0]) if recv_next else None
        requests: Any = _p2p_ops(
            tensor_send_prev=shape_of(tensor_send_prev),  # pyright: ignore[reportArgumentType]
            tensor_recv_prev=from_prev,  # pyright: ignore[reportArgumentType]
            tensor_send_next=shape_of(tensor_send_next),  # pyright: ignore[reportArgumentType]
            tensor_recv_next=from_next,  # pyright: ignore[reportArgumentType]
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,  # pyright: ignore[reportArgumentType]
            next_pipeline_rank=self.next_rank,  # pyright: ignore[reportArgumentType]
        )
        for request in requests.values():
            request.wait()
        nothing = [0, 0, 0]
        return (
            nothing if from_prev is None else from_prev.tolist(),
            nothing if from_next is None else from_next.tolist(),
        )


def _shape_message(shape: list[int]) -> Tensor:
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return torch.tensor(shape, dtype=torch.int64, device=device)


def _interleaved_groups(config: Any) -> dict[str, Any]:
    """A communicator of ours, and the groups that Megatron asks for beside one."""
    groups: Any = ProcessGroupCollection.use_mpu_process_groups(
        ["tp", "cp", "pp", "embd", "pos_embd", "dp_cp"]
    )
    return {
        "p2p_communicator": _OrderedCommunicator(pp_group=groups.pp, config=config),
        "pg_collection": groups,
    }
