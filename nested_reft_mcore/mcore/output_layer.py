"""Megatron's output layer, which makes logits only where somebody wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class OutputLayer(ColumnParallelLinear):
    """Megatron's, with the same weight under the same name, that can hand its input through.

    It is still called then, so that hooks which wait for its weight to arrive run as ever.
    """

    makes_logits = True
    """Off: the output is the input, `[seq, batch, hidden]`."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Logits, or the input; and no bias."""
        return super().forward(input_, *args, **kwargs) if self.makes_logits else (input_, None)


def take_over_output_layer(chunk: GPTModel) -> None:
    """Make the output layer of a chunk, if it has one, an `OutputLayer`.

    GPTModel names the class itself; an object of a class that only adds a method may become one
    of that class, and its weight, buffers and attributes stay.
    """
    if chunk.post_process:
        chunk.output_layer.__class__ = OutputLayer


@contextmanager
def hidden_states_out(chunks: list[GPTModel]) -> Iterator[None]:
    """As long as this lasts the last chunk gives hidden states, `[batch, seq, hidden]`.

    With sequence parallelism `seq` is this rank's part.
    """
    layers: list[Any] = [chunk.output_layer for chunk in chunks if chunk.post_process]
    for layer in layers:
        layer.makes_logits = False
    try:
        yield
    finally:
        for layer in layers:
            layer.makes_logits = True


def output_weight(chunk: GPTModel) -> Tensor:
    """`[padded_vocab / tensor size, hidden]`: the output matrix's shard, tied or not."""
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    weight: Any = chunk.output_layer.weight
    return weight
