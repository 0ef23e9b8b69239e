"""What an update keeps between forward and backward pass, and what it needs at its widest.

Pipeline schedules: 1F1B keeps as many micro-batches as there are stages from this one on
(Narayanan et al., arXiv 2104.04473); the interleaved one keeps chunks, as many as Megatron's
`get_pp_rank_microbatches` runs ahead, and one.
"""

from __future__ import annotations

from dataclasses import dataclass

from nested_reft_mcore.config.schema import ModelConfig
from nested_reft_mcore.planning.layer_costs import (
    FLOAT32,
    backward_bytes,
    norm_bytes,
    saved_bytes,
    stream_bytes,
)
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.workload import Workload


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes of one rank beside weights, gradients and optimizer, at the widest moment."""

    activations: int
    """Kept for the backward passes of all micro-batches under way."""
    logits: int
    """A chunk of logits and what is made of it; last stage."""
    working: int
    """Gradients of activations and of the largest matrix, recomputed activations."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.logits + self.working


def chunks_in_flight(layout: Layout, stage: int, num_micro_batches: int) -> int:
    """Passes of a stage (of one of its chunks) whose activations are kept at the same time."""
    total = num_micro_batches * layout.num_chunks
    ahead = layout.pipeline - stage - 1
    if layout.num_chunks > 1:
        ahead = 2 * ahead + (layout.num_chunks - 1) * layout.pipeline
    return min(total, ahead + 1)


def update_memory(
    model: ModelConfig, layout: Layout, workload: Workload, stage: int
) -> UpdateMemory:
    """The widest moment of an update on a rank of `stage`.

    That is the backward pass of the head, of a layer, or of the embedding.
    """
    shape, layer = workload.shape, layout.layer
    per_chunk, rebuilt = _chunk_bytes(model, layout, workload)
    in_flight = chunks_in_flight(layout, stage, workload.num_micro_batches)
    kept = in_flight * per_chunk
    stream = stream_bytes(layer, shape)
    vocab = layout.vocab_matrix * shape.itemsize
    # A shared matrix has one gradient, whose first half waits for the second.
    waiting = vocab if layout.is_tied and layout.pipeline == 1 else 0
    moments = []
    if layout.is_last(stage):
        full = layer.hidden * shape.tokens * shape.itemsize
        # The final norm, its output put in the order of sequences, and of places again.
        kept += norm_bytes(layer, shape) + full + stream
        logits, weight_gradient = _head_bytes(layout, workload)
        moments.append(UpdateMemory(kept, logits, weight_gradient + full))
    moments.append(UpdateMemory(kept, 0, rebuilt + waiting + backward_bytes(layer, shape)))
    if stage == 0:
        before = kept - per_chunk
        moments.append(UpdateMemory(before, 0, waiting + vocab + 2 * stream))
    return max(moments, key=lambda moment: moment.total)


def _chunk_bytes(model: ModelConfig, layout: Layout, workload: Workload) -> tuple[int, int]:
    """What one pass through the layers of a chunk keeps; what recomputation makes again at once."""
    shape, layer = workload.shape, layout.layer
    layers = layout.architecture.num_layers // (layout.pipeline * layout.num_chunks)
    is_selective = model.recompute_granularity == "selective"
    saved = saved_bytes(layer, shape, keeps_attention=not is_selective)
    if model.recompute_granularity != "full":
        return layers * saved, 0
    group = min(model.recompute_num_layers or 1, layers)
    stream = stream_bytes(layer, shape)
    if model.recompute_method == "uniform":
        return -(-layers // group) * stream, group * saved
    return group * stream + (layers - group) * saved, saved


def _head_bytes(layout: Layout, workload: Workload) -> tuple[int, int]:
    """Logits of `mcore.logprobs` at their widest, and the gradient of the output matrix.

    In bfloat16 a chunk is made, turned into float32, and there is still the last chunk's.
    """
    chunk, matrix = workload.chunk_tokens * layout.vocab_rows, layout.vocab_matrix
    if workload.shape.itemsize == FLOAT32:
        return chunk * 2 * FLOAT32, matrix * FLOAT32
    several = workload.shape.tokens > workload.chunk_tokens
    forward = chunk * (2 + 2 * FLOAT32 + (FLOAT32 if several else 0))
    # Float32 sum over chunks, and a chunk's product before it is added.
    return forward, matrix * (FLOAT32 + 2)
