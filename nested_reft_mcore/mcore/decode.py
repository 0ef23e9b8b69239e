"""Cached decoding over the policy's own parameters: a lean functional forward pass.

It computes what Megatron's modules compute in inference, from the same storage, without the cost of
the modules. Layers and parts of layers that the plan skips are the identity and own no cache.
Hidden states are `[tokens, hidden]` here, on every path and between stages.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore import native
from nested_reft_mcore.mcore.cuda_graphs import GraphedMath
from nested_reft_mcore.mcore.decode_native import NativeMath
from nested_reft_mcore.mcore.decode_torch import TorchMath
from nested_reft_mcore.mcore.kv_cache import KeyValueCache, cache_bytes
from nested_reft_mcore.mcore.layer_weights import DecodeShape, LayerWeights, layer_weights
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.output_layer import output_weight
from nested_reft_mcore.rollout.pipeline_link import PipelineLink
from nested_reft_mcore.rollout.token_pass import TokenPass

TORCH_ONLY = "NESTED_REFT_TORCH_DECODE"
"""Environment variable: anything but empty or 0 leaves native kernels and CUDA graphs out."""


class PolicyDecoder:
    """The policy as the rollout engine sees it (`rollout.decode_model.DecodeModel`).

    Build it once for each policy: with NCCL it makes a process group. It has no weights of its own.
    """

    def __init__(self, policy: Policy, native_kernels: bool | None = None) -> None:
        """`native_kernels`: whether to use them; where they can be used if left out.

        Raises native.Unavailable where they are asked for and cannot be used.
        """
        context, config, architecture = (
            policy.context,
            policy.transformer_config,
            policy.architecture,
        )
        tensor_size = context.tensor.size
        self._policy = policy
        self._shape = DecodeShape(
            hidden_size=config.hidden_size,
            groups=architecture.num_query_groups // tensor_size,
            heads_per_group=architecture.num_attention_heads // architecture.num_query_groups,
            head_dim=architecture.head_dim,
            ffn_size=architecture.ffn_hidden_size // tensor_size,
            epsilon=config.layernorm_epsilon,
        )
        self.link = _pipeline_link(context)
        self.num_chunks = len(policy.chunks)
        self.tensor_group = context.tensor.group
        self.vocab_start = context.tensor.rank * policy.padded_vocab_size // tensor_size
        self.vocab_size = architecture.vocab_size
        self.max_length = architecture.max_position_embeddings
        self.dtype: torch.dtype = config.params_dtype
        self.device = context.device
        self.stage_of_layer = policy.stage_of_layer
        self._math = self._choose_math(native_kernels)
        self._rotation = self._rotation_tables(0)
        self.begin()

    @property
    def plan(self) -> LayerSkipPlan:
        """What the policy skips now."""
        return self._policy.plan

    @property
    def uses_native_kernels(self) -> bool:
        """Whether this process decodes with the native kernels."""
        return isinstance(self._math, NativeMath)

    def begin(self) -> None:
        """Make the weights current, look them up afresh and set the counts to zero."""
        self._policy.sync_parameters()
        self.weights: list[list[LayerWeights]] = [
            [layer_weights(layer) for layer in chunk.decoder.layers]
            for chunk in self._policy.chunks
        ]
        """This process's layers, chunk by chunk."""
        self._math.begin([layer for chunk in self.weights for layer in chunk])
        self._executions = [[0] * len(self.stage_of_layer) for _ in range(2)]

    def executions(self) -> Tensor:
        """Passes since `begin` of each global layer's attention and MLP here, `[2, layers]`."""
        return torch.tensor(self._executions, dtype=torch.int64, device=self.device)

    def hidden_shape(self, num_tokens: int) -> tuple[int, ...]:
        """Shape of the hidden states of so many tokens."""
        return (num_tokens, self._shape.hidden_size)

    def kv_bytes(self, plan: LayerSkipPlan, num_slots: int, length: int) -> int:
        """What `new_cache` of these arguments takes on this process."""
        return cache_bytes(plan, self._layers(), self._shape, num_slots, length, self.dtype)

    def free_bytes(self) -> int:
        """Free memory of the device; on a CPU this process's share of what the machine has left."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(
                self.device
            )
            return torch.cuda.mem_get_info(self.device)[0] + unused
        return psutil.virtual_memory().available // self._policy.context.local_world_size

    def agree_on_least(self, number: int) -> int:
        """The smallest of the numbers that this model's processes pass in."""
        agreed = torch.tensor(number, dtype=torch.int64, device=self.device)
        for dimension in (self._policy.context.tensor, self._policy.context.pipeline):
            if dimension.group is not None:
                dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=dimension.group)
        return int(agreed)

    def new_cache(self, plan: LayerSkipPlan, num_slots: int, length: int) -> KeyValueCache:
        """A zeroed cache of `num_slots` sequences of at most `length` positions each."""
        if self._rotation[0].shape[0] < length:
            self._rotation = self._rotation_tables(length)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return KeyValueCache(plan, self._layers(), self._shape, num_slots, length, like)

    @torch.inference_mode()
    def forward(
        self,
        chunk: int,
        inputs: Tensor,
        tokens: TokenPass,
        cache: KeyValueCache,
        plan: LayerSkipPlan,
    ) -> Tensor:
        """Run a pass through one chunk under `plan`.

        Args:
            chunk: Virtual pipeline chunk of this process.
            inputs: Token ids `[num_tokens]` int64, or hidden states; they are left as they are.
            tokens: Where the tokens stand.
            cache: From `new_cache`, for every layer here whose attention `plan` runs.
            plan: What is skipped.

        Returns:
            Hidden states, or on the very last chunk the logits of the rows' tokens,
            `[rows * width, vocab_local]` float32.

        Raises:
            RuntimeError: the plan runs attention that the cache was not made for.
            ValueError: the pass goes beyond the cache.
        """
        layers = self.weights[chunk]
        attending = [layer.index for layer in layers if not plan.skips_attention(layer.index)]
        if any(index not in cache.keys for index in attending):
            raise RuntimeError(
                f"the cache was made for plan {cache.plan.describe()}, which attends in fewer "
                f"layers than {plan.describe()}"
            )
        is_start = self.link.is_first and chunk == 0
        hidden = self._embed(inputs) if is_start else inputs.clone()
        has_head = self.link.is_last and chunk == self.num_chunks - 1
        # Nothing after the last attention needs more than the tokens whose logits are wanted.
        last_attention = attending[-1] if attending else -1
        current = self._math.start(hidden, tokens, cache, self._rotation)
        if has_head and not attending:
            current.keep_rows()
        for layer in layers:
            if not plan.skips_attention(layer.index):
                if has_head and layer.index == last_attention:
                    current.keep_rows()
                current.attention(layer)
                self._executions[0][layer.index] += 1
            if not plan.skips_mlp(layer.index):
                current.mlp(layer)
                self._executions[1][layer.index] += 1
        return self._logits(current.hidden[: tokens.num_row_tokens]) if has_head else current.hidden

    def _layers(self) -> list[int]:
        """Global indices of this process's layers."""
        return [layer.index for chunk in self.weights for layer in chunk]

    def _choose_math(self, wanted: bool | None) -> NativeMath | TorchMath:
        """The way to compute; hidden states look the same on all, so processes may differ."""
        sum_over_shards = self._sum_over_shards if self.tensor_group is not None else None
        is_torch_only = os.environ.get(TORCH_ONLY, "0") not in ("", "0")
        if self.device.type == "cuda" and not is_torch_only:
            return GraphedMath(self._shape, sum_over_shards)
        fits = self.device.type == "cpu" and self.dtype == torch.float32
        if wanted is None:
            wanted = fits and not is_torch_only and not native.problem()
        elif wanted and not fits:
            raise native.Unavailable(f"they compute in float32, not in {self.dtype}")
        if wanted:
            return NativeMath(self._shape, sum_over_shards)
        return TorchMath(self._shape, sum_over_shards)

    def _sum_over_shards(self, partial: Tensor) -> None:
        dist.all_reduce(partial, group=self.tensor_group)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding, each from the rank that holds it."""
        weight = self._policy.chunks[0].embedding.word_embeddings.weight
        if self.tensor_group is None:
            return F.embedding(tokens, weight)
        local = tokens - self.vocab_start
        mine = (local >= 0) & (local < weight.shape[0])
        rows = F.embedding(torch.where(mine, local, 0), weight)
        rows = torch.where(mine[..., None], rows, 0.0)
        self._sum_over_shards(rows)
        return rows

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[n, vocab_local]` from hidden states `[n, hidden]`."""
        last: Any = self._policy.chunks[-1]
        norm = last.decoder.final_layernorm.weight
        return self._math.logits(hidden, norm, output_weight(last))

    def _rotation_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles of every position, `[length, head_dim / 2]`."""
        frequencies = self._policy.chunks[0].rotary_pos_emb.inv_freq.to(self.device)
        positions = torch.arange(length, device=self.device, dtype=frequencies.dtype)
        angles = torch.outer(positions, frequencies)
        return angles.cos().float(), angles.sin().float()


def _pipeline_link(context: ParallelContext) -> PipelineLink:
    """The stages' messages; with NCCL the way back to the first stage is a group of its own."""
    pipeline = context.pipeline
    return_group = None
    if pipeline.group is not None and dist.get_backend(pipeline.group) == "nccl":
        made = dist.new_group(list(pipeline.ranks), use_local_synchronization=True)
        return_group = made if isinstance(made, dist.ProcessGroup) else None
    return PipelineLink(pipeline.rank, pipeline.ranks, pipeline.group, return_group)
