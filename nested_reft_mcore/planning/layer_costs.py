"""What one transformer layer costs on one tensor-parallel rank: parameters, bytes, operations.

Activations are counted tensor by tensor, as Korthikanti et al. (arXiv 2205.05198) count them for
GPT; here for RMSNorm, grouped queries, attention that keeps no score matrix, and SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.architecture import ModelArchitecture

Kernels = Literal["fused", "cpu"]
"""`fused`: CUDA, where norms and SwiGLU keep their inputs alone; `cpu`: torch's plain operators."""

FLOAT32 = 4


@dataclass(frozen=True)
class LayerShape:
    """One rank's share of a layer; widths in elements."""

    hidden: int
    query: int
    """Width of its query heads together; that of the attention's output too."""
    key: int
    """Width of its key heads together; values are as wide."""
    ffn: int
    """Width of the MLP, the gate and the other half each."""
    heads: int
    head_dim: int
    has_qkv_bias: bool
    has_qk_norm: bool

    @classmethod
    def of(cls, architecture: ModelArchitecture, tensor_size: int) -> LayerShape:
        """The share of each of `tensor_size` ranks, which divides heads, groups and MLP."""
        dim = architecture.head_dim
        return cls(
            hidden=architecture.hidden_size,
            query=architecture.num_attention_heads * dim // tensor_size,
            key=architecture.num_query_groups * dim // tensor_size,
            ffn=architecture.ffn_hidden_size // tensor_size,
            heads=architecture.num_attention_heads // tensor_size,
            head_dim=dim,
            has_qkv_bias=architecture.add_qkv_bias,
            has_qk_norm=architecture.qk_layernorm,
        )

    @property
    def qkv(self) -> int:
        """Width of query, key and value together."""
        return self.query + 2 * self.key

    @property
    def attention_parameters(self) -> int:
        """Of the attention and the norm before it."""
        matrices = self.hidden * (self.qkv + self.query)
        bias = self.qkv if self.has_qkv_bias else 0
        return matrices + bias + self.hidden + (2 * self.head_dim if self.has_qk_norm else 0)

    @property
    def mlp_parameters(self) -> int:
        """Of the MLP and the norm before it."""
        return 3 * self.hidden * self.ffn + self.hidden

    @property
    def parameters(self) -> int:
        """Of the layer."""
        return self.attention_parameters + self.mlp_parameters

    @property
    def largest_matrix(self) -> int:
        """Elements; its gradient exists twice for a moment."""
        return self.hidden * max(self.qkv, self.query, 2 * self.ffn)


@dataclass(frozen=True)
class ActivationShape:
    """The tokens of a micro-batch and how they lie in memory."""

    tokens: int
    """Rows times length, padding included."""
    length: int
    """Of a row."""
    itemsize: int
    """Bytes of an element: 2 for bfloat16, 4 for float32."""
    sequence_shards: int
    """Ranks that the norms' inputs are spread over: the tensor-parallel size with
    sequence parallelism, else 1."""
    kernels: Kernels

    @property
    def stream_bytes_per_width(self) -> int:
        """Bytes of one hidden unit of this rank's residual stream."""
        return self.tokens // self.sequence_shards * self.itemsize


def stream_bytes(layer: LayerShape, shape: ActivationShape) -> int:
    """The residual stream: what a layer takes in and what stages send each other."""
    return layer.hidden * shape.stream_bytes_per_width


def norm_bytes(layer: LayerShape, shape: ActivationShape) -> int:
    """What one RMSNorm over the hidden size keeps for its backward pass.

    On a CPU it is made of single operators, which keep the input and the normalised input, both
    in float32.
    """
    rows = shape.tokens // shape.sequence_shards
    scales = rows * FLOAT32
    if shape.kernels == "fused":
        return stream_bytes(layer, shape) + scales
    return 2 * rows * layer.hidden * FLOAT32 + scales


def saved_bytes(layer: LayerShape, shape: ActivationShape, *, keeps_attention: bool = True) -> int:
    """What a layer's forward pass keeps for its backward pass.

    Norm, query-key-value product (its input), rotation (queries, keys, values before and queries
    and keys after), attention (output, one number for each head and token), projection (input:
    the attention's output), norm, first MLP product (input), SwiGLU, second product (input).
    `keeps_attention` is false with selective recomputation: attention's own record goes.
    """
    size, tokens = shape.itemsize, shape.tokens
    streams = 2 * norm_bytes(layer, shape) + 2 * stream_bytes(layer, shape)
    rotated = layer.query + layer.key
    attention = tokens * size * (layer.qkv + rotated + layer.query)
    # Cosine and sine, for queries and for keys, which all rows of a micro-batch share.
    attention += 4 * shape.length * layer.head_dim * size
    if keeps_attention:
        attention += tokens * layer.heads * FLOAT32
    if layer.has_qk_norm:
        factor = size if shape.kernels == "fused" else 2 * FLOAT32
        attention += tokens * rotated * factor
    # On a CPU the gate after SiLU and a copy of the other half are kept too.
    mlp = tokens * size * layer.ffn * (3 if shape.kernels == "fused" else 5)
    return streams + attention + mlp


def backward_bytes(layer: LayerShape, shape: ActivationShape) -> int:
    """What the backward pass of a layer needs beside what was saved, at its widest.

    Gradients of the residual stream, of the MLP's halves, and of the largest matrix.
    """
    halves = shape.tokens * shape.itemsize * layer.ffn * 3
    return 2 * stream_bytes(layer, shape) + halves + layer.largest_matrix * shape.itemsize


def kv_bytes_per_token(layer: LayerShape, itemsize: int) -> int:
    """Keys and values of one token in the cache of one attending layer."""
    return 2 * layer.key * itemsize


def forward_operations(layer: LayerShape, tokens: float, context: float) -> tuple[float, float]:
    """Operations of attention and of the MLP for `tokens` that look at `context` places each."""
    attention = 2 * tokens * layer.hidden * (layer.qkv + layer.query)
    attention += score_operations(layer, tokens * context)
    return attention, 6 * tokens * layer.hidden * layer.ffn


def score_operations(layer: LayerShape, pairs: float) -> float:
    """Operations of attention itself for so many pairs of a query and a key, of all heads."""
    return 4 * pairs * layer.query


def parts_run(plan: LayerSkipPlan, layers: list[int]) -> tuple[int, int]:
    """How many attentions and how many MLPs of these global layers a plan runs."""
    attentions = sum(not plan.skips_attention(index) for index in layers)
    return attentions, sum(not plan.skips_mlp(index) for index in layers)
