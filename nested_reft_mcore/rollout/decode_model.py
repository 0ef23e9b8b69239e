"""What the engine asks of a policy: cached forward passes of one process's part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed import ProcessGroup

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.rollout.pipeline_link import PipelineLink
from nested_reft_mcore.rollout.token_pass import TokenPass


@runtime_checkable
class DecodeCache(Protocol):
    """Keys and values of all slots, on one process, for the layers whose attention a plan runs."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        ...

    def clear(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold; what may be NaN there must not reach a later sequence."""
        ...


Cache = TypeVar("Cache", bound=DecodeCache)


@runtime_checkable
class DecodeModel(Protocol[Cache]):
    """One process of the pipeline; `mcore.decode` implements it over the policy's own weights.

    Chunk v of stage p is followed by chunk v of stage p + 1, and the last stage's chunk v by the
    first stage's chunk v + 1. The very first chunk takes token ids, the very last one gives this
    tensor-parallel rank's columns of the logits in float32; between them travel hidden states of
    `hidden_shape` and type `dtype`.
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

    def hidden_shape(self, num_tokens: int) -> tuple[int, ...]:
        """Shape of the hidden states of so many tokens, the same on every process."""
        ...

    def kv_bytes(self, plan: LayerSkipPlan, num_slots: int, length: int) -> int:
        """What `new_cache` of these arguments takes on this process."""
        ...

    def free_bytes(self) -> int:
        """Memory of this process's device that a cache may take."""
        ...

    def agree_on_least(self, number: int) -> int:
        """The smallest of the numbers that this model's processes pass in."""
        ...

    def new_cache(self, plan: LayerSkipPlan, num_slots: int, length: int) -> Cache:
        """A cache of `num_slots` sequences of at most `length` positions each."""
        ...

    def forward(
        self, chunk: int, inputs: Tensor, tokens: TokenPass, cache: Cache, plan: LayerSkipPlan
    ) -> Tensor:
        """Run a pass through one chunk under `plan`, whose attention all has a cache.

        `inputs`: token ids `[num_tokens]` int64 or hidden states. Returns hidden states, or on the
        very last chunk the logits of the rows' tokens, `[rows * width, vocab_local]`.
        """
        ...

    def executions(self) -> Int64[Tensor, "2 layers"]:
        """Forward passes since `begin` of every global layer's attention and MLP, here alone."""
        ...
