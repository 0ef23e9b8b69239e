"""What the engine asks of a policy: cached forward passes of one process's part of the model."""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed import ProcessGroup

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.rollout.pipeline_link import PipelineLink


@runtime_checkable
class DecodeCache(Protocol):
    """Keys and values of one slot group, on one process, for the layers that the plan runs."""

    def select(self, rows: Int64[Tensor, " kept"]) -> None:
        """Keep these rows, in this order, and forget the others."""
        ...


Cache = TypeVar("Cache", bound=DecodeCache)


@runtime_checkable
class DecodeModel(Protocol[Cache]):
    """One process of the pipeline; `mcore.decode` implements it over the policy's own weights.

    Chunk v of stage p is followed by chunk v of stage p + 1, and the last stage's chunk v by the
    first stage's chunk v + 1. The very first chunk takes token ids, the very last one gives this
    tensor-parallel rank's columns of the logits in float32; between them travel hidden states
    `[sequences, positions, hidden]` of type `dtype`.
    """

    link: PipelineLink
    """The neighbouring stages."""
    num_chunks: int
    """Virtual pipeline chunks of this process."""
    tensor_group: ProcessGroup | None
    """Who shares the vocabulary; absent where nobody does."""
    vocab_start: int
    """Id of this rank's first column of logits."""
    vocab_size: int
    """Ids from here on are padding."""
    hidden_size: int
    """Width of the hidden states."""
    max_length: int
    """Longest sequence, prompt and response together."""
    dtype: torch.dtype
    """Type of the hidden states."""
    device: torch.device
    """Where everything lies."""
    stage_of_layer: tuple[int, ...]
    """The pipeline rank that holds each global layer."""

    @property
    def plan(self) -> LayerSkipPlan:
        """What the policy skips now."""
        ...

    def begin(self) -> None:
        """Make the weights current and forget earlier counts; once before each batch."""
        ...

    def new_cache(self, source: Int64[Tensor, " rows"], max_length: int) -> Cache:
        """A cache whose row i continues prompt `source[i]` of the prefill, up to `max_length`."""
        ...

    def prefill(
        self, chunk: int, inputs: Tensor, lengths: Int64[Tensor, " prompts"], cache: Cache
    ) -> Tensor:
        """Run whole prompts, right-padded, and cache them for every row that continues them.

        `inputs`: token ids `[prompts, positions]` or hidden states. Returns hidden states, or on
        the very last chunk the logits after each prompt's last token, `[prompts, vocab_local]`.
        """
        ...

    def decode(
        self,
        chunk: int,
        inputs: Tensor,
        positions: Int64[Tensor, " rows"],
        span: int,
        ragged: bool,
        cache: Cache,
    ) -> Tensor:
        """Run one token per row at its own position and cache it.

        `inputs`: token ids `[rows, 1]` or hidden states. No position is `span` or more, and they
        are all equal unless `ragged`. Returns hidden states, or on the very last chunk logits
        `[rows, vocab_local]`.
        """
        ...

    def executions(self) -> Int64[Tensor, "2 layers"]:
        """Forward passes since `begin` of every global layer's attention and MLP, here alone."""
        ...
