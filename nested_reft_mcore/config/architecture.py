"""The shape of a model, in Megatron's words."""

from typing import Literal

from pydantic import Field

from nested_reft_mcore.config.base import Section


class RopeScaling(Section):
    """Rotary frequencies stretched as in Llama 3.1 (`rope_type` "llama3").

    Wavelengths above `original_max_position_embeddings / low_freq_factor` grow `factor` times,
    those below `original_max_position_embeddings / high_freq_factor` stay, those between are mixed.
    """

    factor: float = Field(gt=0)
    """How many times longer the long wavelengths become."""
    low_freq_factor: float = Field(gt=0)
    """Where the longest wavelengths start, in turns over the original length."""
    high_freq_factor: float = Field(gt=0)
    """Where the shortest wavelengths end, in turns over the original length."""
    original_max_position_embeddings: int = Field(gt=0)
    """Longest sequence before the stretching."""


class ModelArchitecture(Section):
    """A decoder-only transformer with RMSNorm, SwiGLU, RoPE and grouped-query attention.

    Covers the families of `hf/`, which makes one from a Hugging Face `config.json`.
    """

    num_layers: int = Field(gt=0)
    """Transformer layers."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_attention_heads: int = Field(gt=0)
    """Query heads."""
    num_query_groups: int = Field(gt=0)
    """Key-value heads; must divide `num_attention_heads`."""
    ffn_hidden_size: int = Field(gt=0)
    """Width of the gated MLP."""
    kv_channels: int | None = Field(default=None, gt=0)
    """Size of one head; `hidden_size / num_attention_heads` if left out."""
    vocab_size: int = Field(gt=0)
    """Real vocabulary, before Megatron's padding."""
    max_position_embeddings: int = Field(default=4096, gt=0)
    """Longest sequence, prompt and response together."""
    rotary_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary embedding (`rope_theta`)."""
    rope_scaling: RopeScaling | None = None
    """Stretched rotary frequencies (Llama 3.1); plain ones if left out."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of RMSNorm."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm over each head's query and key (Qwen3)."""
    untie_embeddings_and_output_weights: bool = False
    """Whether the output layer has weights of its own."""
    family: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    """Hugging Face layout to export to."""
    init_method_std: float = Field(default=0.02, gt=0)
    """Standard deviation of fresh weights."""
    embedding_init_method_std: float | None = Field(default=None, gt=0)
    """Standard deviation of a fresh embedding; `init_method_std` if left out."""

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads
