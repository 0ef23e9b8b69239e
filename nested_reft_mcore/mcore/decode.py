"""Cached decoding over the policy's own parameters: a lean functional forward pass.

It computes what Megatron's modules compute in inference, from the same storage, without the cost of
the modules. Layers and parts of layers that the plan skips are the identity and own no cache.
Hidden states are `[sequences, positions, hidden]` here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.nn import functional as F

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.pipeline_link import PipelineLink


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


class KeyValueCache:
    """Keys, rotated, and values of the layers whose attention `plan` runs."""

    def __init__(
        self, plan: LayerSkipPlan, source: Tensor, shapes: dict[int, tuple[int, ...]], like: Tensor
    ) -> None:
        self.plan = plan
        """Fixed for the cache's life: another plan would read what was never written."""
        self.source = source
        """`[rows]`: prompt of the prefill that a row continues."""
        # Zeros, not whatever memory holds: masked places get weight 0, but 0 * NaN is NaN.
        self.keys = {layer: like.new_zeros(shape) for layer, shape in shapes.items()}
        """By global layer, `[rows, groups, length, head_dim]`."""
        self.values = {layer: like.new_zeros(shape) for layer, shape in shapes.items()}
        """By global layer, `[rows, groups, length, head_dim]`."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.source = self.source[rows]
        for layer in self.keys:
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]


@dataclass(frozen=True)
class _Places:
    """Where the tokens of one pass stand, and what each of them may attend to."""

    cosine: Tensor
    """`[sequences or 1, positions, 1, head_dim]`."""
    sine: Tensor
    """The same shape, its first half negated: the sign of the rotation."""
    rows: Tensor | None = None
    """`[rows]` 0, 1, 2, ... when decoding; absent in a prefill."""
    positions: Tensor | None = None
    """`[rows]`: the one position of each row when decoding."""
    span: int = 0
    """Cached places to attend to when decoding."""
    mask: Tensor | None = None
    """`[rows, 1, 1, span]`, true where attended; absent where all are."""


class PolicyDecoder:
    """The policy as the rollout engine sees it (`rollout.decode_model.DecodeModel`).

    Build it once for each policy: with NCCL it makes a process group. It has no weights of its own,
    and it follows the plan of the policy's context.
    """

    def __init__(self, policy: Policy) -> None:
        context, config, shape = policy.context, policy.transformer_config, policy.architecture
        self._policy = policy
        self._head_dim = shape.head_dim
        self._epsilon: float = config.layernorm_epsilon
        self._num_groups = shape.num_query_groups // context.tensor.size
        self._heads_per_group = shape.num_attention_heads // shape.num_query_groups
        self.link = _pipeline_link(context)
        self.num_chunks = len(policy.chunks)
        self.tensor_group = context.tensor.group
        self.vocab_start = context.tensor.rank * policy.padded_vocab_size // context.tensor.size
        self.vocab_size = shape.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_length = shape.max_position_embeddings
        self.dtype: torch.dtype = config.params_dtype
        self.device = context.device
        self.stage_of_layer = policy.stage_of_layer
        self.begin()

    @property
    def plan(self) -> LayerSkipPlan:
        """What the policy skips now."""
        return self._policy.plan

    def begin(self) -> None:
        """Make the weights current, look them up afresh and set the counts to zero."""
        self._policy.sync_parameters()
        self.weights = [
            [layer_weights(layer) for layer in chunk.decoder.layers]
            for chunk in self._policy.chunks
        ]
        """This process's layers, chunk by chunk."""
        self._executions = [[0] * len(self.stage_of_layer) for _ in range(2)]

    def executions(self) -> Tensor:
        """Passes since `begin` of each global layer's attention and MLP here, `[2, layers]`."""
        return torch.tensor(self._executions, dtype=torch.int64, device=self.device)

    def new_cache(self, source: Tensor, max_length: int) -> KeyValueCache:
        """Zeroed caches `[rows, groups, max_length, head_dim]` of the layers that attend."""
        shape = (source.shape[0], self._num_groups, max_length, self._head_dim)
        shapes = {
            layer.index: shape
            for chunk in self.weights
            for layer in chunk
            if not self.plan.skips_attention(layer.index)
        }
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return KeyValueCache(self.plan, source, shapes, like)

    @torch.inference_mode()
    def prefill(self, chunk: int, inputs: Tensor, lengths: Tensor, cache: KeyValueCache) -> Tensor:
        """Run right-padded prompts and cache them for every row of theirs.

        Args:
            chunk: Virtual pipeline chunk of this process.
            inputs: Token ids `[prompts, positions]`, or hidden states.
            lengths: `[prompts]` real tokens; what is computed beyond them is never read.
            cache: From `new_cache` under the plan of now.

        Returns:
            Hidden states, or on the very last chunk float32 logits `[prompts, vocab_local]` after
            each prompt's last token.
        """
        cosine, sine = self._rotation(torch.arange(inputs.shape[1], device=self.device))
        hidden = self._run_layers(chunk, inputs, _Places(cosine[None], sine[None]), cache)
        if not self._has_head(chunk):
            return hidden
        return self._logits(hidden[torch.arange(hidden.shape[0], device=self.device), lengths - 1])

    @torch.inference_mode()
    def decode(
        self,
        chunk: int,
        inputs: Tensor,
        positions: Tensor,
        span: int,
        ragged: bool,
        cache: KeyValueCache,
    ) -> Tensor:
        """Run one token per row.

        Args:
            chunk: Virtual pipeline chunk of this process.
            inputs: Token ids `[rows, 1]`, or hidden states.
            positions: `[rows]` places of these tokens, below `span`.
            span: Cached places that any row looks at.
            ragged: Whether positions differ.
            cache: Holds every earlier position of every row.

        Returns:
            Hidden states, or on the very last chunk float32 logits `[rows, vocab_local]`.
        """
        cosine, sine = self._rotation(positions)
        mask = None
        if ragged:
            mask = torch.arange(span, device=self.device) <= positions[:, None]
            mask = mask[:, None, None]
        rows = torch.arange(inputs.shape[0], device=self.device)
        places = _Places(cosine[:, None], sine[:, None], rows, positions, span, mask)
        hidden = self._run_layers(chunk, inputs, places, cache)
        return self._logits(hidden[:, 0]) if self._has_head(chunk) else hidden

    def _run_layers(
        self, chunk: int, inputs: Tensor, places: _Places, cache: KeyValueCache
    ) -> Tensor:
        if cache.plan != self.plan:
            raise RuntimeError(
                f"the cache was filled under plan {cache.plan.describe()}, but the policy now "
                f"skips {self.plan.describe()}"
            )
        hidden = inputs
        if self.link.is_first and chunk == 0:
            hidden = self._embed(inputs)
        for layer in self.weights[chunk]:
            if not self.plan.skips_attention(layer.index):
                hidden = hidden + self._attention(layer, hidden, places, cache)
                self._executions[0][layer.index] += 1
            if not self.plan.skips_mlp(layer.index):
                hidden = hidden + self._mlp(layer, hidden)
                self._executions[1][layer.index] += 1
        return hidden

    def _attention(
        self, layer: LayerWeights, hidden: Tensor, places: _Places, cache: KeyValueCache
    ) -> Tensor:
        """What attention adds to the residual stream."""
        normed = self._norm(hidden, layer.attention_norm)
        mixed = F.linear(normed, layer.qkv, layer.qkv_bias)
        mixed = mixed.unflatten(-1, (self._num_groups, self._heads_per_group + 2, self._head_dim))
        query, key, value = mixed.split((self._heads_per_group, 1, 1), dim=3)
        query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        if layer.query_norm is not None:
            query = self._norm(query, layer.query_norm)
        if layer.key_norm is not None:
            key = self._norm(key, layer.key_norm)
        query = _rotate(query, places)
        key = _rotate(key, places).transpose(1, 2)
        value = value.transpose(1, 2)
        if places.positions is None:
            context = self._attend_prompt(query, key, value, cache, layer.index)
        else:
            context = self._attend_cache(query, key, value, places, cache, layer.index)
        return self._sum_over_shards(F.linear(context, layer.projection))

    def _attend_prompt(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValueCache, layer: int
    ) -> Tensor:
        """Causal attention within prompts; `query` `[prompts, positions, heads, head_dim]`."""
        length = query.shape[1]
        cache.keys[layer][:, :, :length] = key[cache.source]
        cache.values[layer][:, :, :length] = value[cache.source]
        context = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, is_causal=True, enable_gqa=self._heads_per_group > 1
        )
        return context.transpose(1, 2).flatten(2)

    def _attend_cache(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        places: _Places,
        cache: KeyValueCache,
        layer: int,
    ) -> Tensor:
        """One new token per row; `query` `[rows, 1, heads, head_dim]`."""
        keys, values = cache.keys[layer], cache.values[layer]
        keys[places.rows, :, places.positions] = key[:, :, 0]
        values[places.rows, :, places.positions] = value[:, :, 0]
        # The heads of a group share keys: as queries of one attention nothing is repeated.
        context = F.scaled_dot_product_attention(
            query.unflatten(2, (self._num_groups, self._heads_per_group))[:, 0],
            keys[:, :, : places.span],
            values[:, :, : places.span],
            attn_mask=places.mask,
        )
        return context.flatten(1)[:, None]

    def _mlp(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        """What the SwiGLU MLP adds to the residual stream."""
        gate, up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_and_up).chunk(2, dim=-1)
        return self._sum_over_shards(F.linear(F.silu(gate) * up, layer.down))

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self._epsilon)

    def _sum_over_shards(self, partial: Tensor) -> Tensor:
        if self.tensor_group is not None:
            dist.all_reduce(partial, group=self.tensor_group)
        return partial

    def _embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding, each from the rank that holds it."""
        weight = self._policy.chunks[0].embedding.word_embeddings.weight
        if self.tensor_group is None:
            return F.embedding(tokens, weight)
        local = tokens - self.vocab_start
        mine = (local >= 0) & (local < weight.shape[0])
        rows = F.embedding(torch.where(mine, local, 0), weight)
        return self._sum_over_shards(torch.where(mine[..., None], rows, 0.0))

    def _has_head(self, chunk: int) -> bool:
        return self.link.is_last and chunk == self.num_chunks - 1

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[n, vocab_local]` from hidden states `[n, hidden]`."""
        last: Any = self._policy.chunks[-1]
        weight = (
            last.shared_embedding_or_output_weight()
            if last.share_embeddings_and_output_weights
            else last.output_layer.weight
        )
        return F.linear(self._norm(hidden, last.decoder.final_layernorm.weight), weight).float()

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine `[n, 1, head_dim]` of rotary embedding at `positions` `[n]`.

        Megatron rotates halves: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin).
        """
        frequencies = self._policy.chunks[0].rotary_pos_emb.inv_freq.to(self.device)
        angles = torch.outer(positions.to(frequencies.dtype), frequencies)
        cosine, sine = angles.cos(), angles.sin()
        cosine = torch.cat([cosine, cosine], dim=-1)
        sine = torch.cat([-sine, sine], dim=-1)
        return cosine[:, None].to(self.dtype), sine[:, None].to(self.dtype)


def _rotate(heads: Tensor, places: _Places) -> Tensor:
    """Rotary embedding of `[sequences, positions, heads, head_dim]`."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return heads * places.cosine + swapped * places.sine


def layer_weights(layer: Any) -> LayerWeights:
    """The parameters of a `NestedTransformerLayer` where they lie, whichever spec built it."""
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
    """The weight of a norm over heads; None where the model has none."""
    return None if module is None or isinstance(module, IdentityOp) else module.weight.detach()


def _pipeline_link(context: ParallelContext) -> PipelineLink:
    """The stages' messages; with NCCL the way back to the first stage is a group of its own."""
    pipeline = context.pipeline
    return_group = None
    if pipeline.group is not None and dist.get_backend(pipeline.group) == "nccl":
        made = dist.new_group(list(pipeline.ranks), use_local_synchronization=True)
        return_group = made if isinstance(made, dist.ProcessGroup) else None
    return PipelineLink(pipeline.rank, pipeline.ranks, pipeline.group, return_group)
