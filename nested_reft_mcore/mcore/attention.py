"""Core attention and norm of the local layer spec, on torch's own kernels."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SdpaCoreAttention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`, which keeps no s x s matrix.

    Sequences start at position 0 and are padded on the right, so causality alone keeps padding out
    of every real position; other masks and packed sequences are refused.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *_args: Any, **kwargs: Any):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = kwargs.get("softmax_scale")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[seq, batch, heads, head_dim]`.
            key, value: `[seq, batch, groups, head_dim]`.
            attention_mask: Must be absent.
            attn_mask_type, attention_bias, packed_seq_params: Megatron's interface; the last two
                must be absent.

        Returns:
            `[seq, batch, heads * head_dim]`.
        """
        if (
            attention_mask is not None
            or attention_bias is not None
            or packed_seq_params is not None
        ):
            raise ValueError(
                "SdpaCoreAttention is causal: it takes no mask, bias or packed sequences"
            )
        seq, batch = query.shape[:2]
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).reshape(seq, batch, -1)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, usable with sequence parallelism, which Megatron's own wrapper refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps)
        # Megatron sums the gradients of parameters so marked over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
