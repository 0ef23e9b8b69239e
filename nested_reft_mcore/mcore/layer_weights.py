"""The policy's parameters as decoding reads them: where they lie, whatever the layer's spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer's parameters, sharing their storage; matrices are this rank's shards."""

    index: int
    """Global, 0-based."""
    attention_norm: Tensor
    """`[hidden]`."""
    qkv: Tensor
    """`[groups * (heads per group + 2) * head_dim, hidden]`: queries, key and value by group."""
    qkv_bias: Tensor | None
    """As many as `qkv` has rows, where the model has one."""
    query_norm: Tensor | None
    """`[head_dim]`, where the model has one."""
    key_norm: Tensor | None
    """`[head_dim]`, where the model has one."""
    projection: Tensor
    """`[hidden, heads * head_dim]`."""
    mlp_norm: Tensor
    """`[hidden]`."""
    gate_and_up: Tensor
    """`[2 * ffn, hidden]`: gate above up."""
    down: Tensor
    """`[hidden, ffn]`."""


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of this rank's shard of every layer."""

    hidden_size: int
    groups: int
    """Key-value heads."""
    heads_per_group: int
    """Query heads that share one key-value head."""
    head_dim: int
    ffn_size: int
    epsilon: float
    """Of the norms."""


def layer_weights(layer: Any) -> LayerWeights:
    """The parameters of a `NestedTransformerLayer` where they lie."""
    attention, mlp = layer.self_attention, layer.mlp
    return LayerWeights(
        index=layer.global_index,
        attention_norm=_norm_weight(layer.input_layernorm, attention.linear_qkv),
        qkv=attention.linear_qkv.weight.detach(),
        qkv_bias=_bias(attention.linear_qkv),
        query_norm=_head_norm(attention.q_layernorm),
        key_norm=_head_norm(attention.k_layernorm),
        projection=attention.linear_proj.weight.detach(),
        mlp_norm=_norm_weight(layer.pre_mlp_layernorm, mlp.linear_fc1),
        gate_and_up=mlp.linear_fc1.weight.detach(),
        down=mlp.linear_fc2.weight.detach(),
    )


def parameters_of(weights: LayerWeights) -> Iterator[Tensor]:
    """Every tensor of the record."""
    for value in vars(weights).values():
        if isinstance(value, Tensor):
            yield value


def _norm_weight(norm: Any, linear: Any) -> Tensor:
    """A norm's weight: its own, or with Transformer Engine the following linear layer's."""
    weight = norm.weight if hasattr(norm, "weight") else linear.layer_norm_weight
    return weight.detach()


def _bias(linear: Any) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    # Transformer Engine keeps an empty tensor where there is no bias.
    return bias.detach() if bias is not None and bias.numel() else None


def _head_norm(module: Any) -> Tensor | None:
    """The weight of a norm over heads; Megatron puts an identity where the model has none."""
    weight = getattr(module, "weight", None)
    return None if weight is None else weight.detach()
