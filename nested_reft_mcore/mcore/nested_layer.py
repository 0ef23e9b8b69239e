"""A transformer layer that can be skipped, whole or in part."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class NestedTransformerLayer(TransformerLayer):
    """Megatron's layer, which returns its input unchanged where the plan skips it.

    Each half of a layer adds to the residual stream, so a skipped half is the identity. Parameter
    names, checkpoints and optimizer are those of the stock layer; with nothing skipped it computes
    the same bits. `Policy.nested` sets the flags and always restores them.
    """

    skip_attention = False
    """Whether the attention half is skipped."""
    skip_mlp = False
    """Whether the MLP half is skipped."""

    @property
    def global_index(self) -> int:
        """0-based index in the whole model, over all pipeline stages and chunks."""
        return self.layer_number - 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return before any module hook or CUDA graph if the whole layer is skipped."""
        if self.skip_attention and self.skip_mlp:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return hidden_states, kwargs.get("context")
        return super().__call__(*args, **kwargs)

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.skip_attention:
            return hidden_states, kwargs.get("context")
        return super()._forward_attention(hidden_states, *args, **kwargs)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.skip_mlp:
            return hidden_states
        return super()._forward_mlp(hidden_states, *args, **kwargs)
