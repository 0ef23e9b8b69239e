"""From our configuration to Megatron's TransformerConfig and layer spec."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.mcore.attention import RMSNorm, SdpaCoreAttention
from nested_reft_mcore.mcore.nested_layer import NestedTransformerLayer


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether layers come from Transformer Engine: asked for, or there and CUDA too."""
    if model.transformer_impl != "auto":
        return model.transformer_impl == "transformer_engine"
    installed = importlib.util.find_spec("transformer_engine") is not None
    return installed and torch.cuda.is_available()


def transformer_config(
    architecture: ModelArchitecture, model: ModelConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron's description of the model and of how it is computed."""
    dtype = getattr(torch, model.dtype)
    has_cuda = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_hidden_size,
        layernorm_epsilon=architecture.layernorm_epsilon,
        add_qkv_bias=architecture.add_qkv_bias,
        # Also makes Megatron sum the gradients of these norms over the tensor-parallel ranks, each
        # of which applies them to its own heads only.
        qk_layernorm=architecture.qk_layernorm,
        init_method_std=architecture.init_method_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are filled by mcore.weights, the same for every layout.
        perform_initialization=False,
        use_cpu_initialization=not has_cuda,
        **_parallel_options(parallel),
        **_recompute_options(model),
        # The fusions are CUDA kernels of Megatron, TE or apex.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=has_cuda,
        bias_dropout_fusion=False,
    )


def block_spec(
    config: TransformerConfig, model: ModelConfig, vp_stage: int | None
) -> TransformerBlockSubmodules | ModuleSpec:
    """The layers of one model chunk, of our skippable class."""
    if uses_transformer_engine(model):
        spec = copy.copy(
            get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        )
        spec.module = NestedTransformerLayer
        return spec
    spec: Any = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.module = NestedTransformerLayer
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    layer_norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=layer_norm)


def _parallel_options(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # Losses are sums; gradients are divided once, by the global count of tokens.
        "calculate_per_token_loss": True,
        "deallocate_pipeline_outputs": True,
        # Between two stages of the interleaved schedule the previous rank is also the next one, and
        # batched messages to it are taken in the wrong order: wrong values, no error.
        "batch_p2p_comm": parallel.virtual_pipeline_model_parallel_size is None,
        "overlap_p2p_comm": False,
    }


def _recompute_options(model: ModelConfig) -> dict[str, Any]:
    if model.recompute_granularity is None:
        return {}
    return {
        "recompute_granularity": model.recompute_granularity,
        "recompute_method": model.recompute_method,
        "recompute_num_layers": model.recompute_num_layers,
    }
