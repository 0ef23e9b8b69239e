"""Qwen2 and Qwen2.5: Llama's layout, with a bias on query, key and value."""

from collections.abc import Mapping
from typing import Any

from nested_reft_mcore.hf import llama
from nested_reft_mcore.hf.family import Family, Refusal
from nested_reft_mcore.hf.weight_map import Axis, HfTensor, MapEntry, WeightKind


def _has_sliding_layers(config: Mapping[str, Any]) -> bool:
    """Whether some layer looks no further than the window, as transformers decides it."""
    if not config.get("use_sliding_window") or config["sliding_window"] is None:
        return False
    # Layer types that are given decide, and sliding ones are refused whatever the family.
    first_sliding = config["max_window_layers"] or 0
    return config.get("layer_types") is None and config["num_hidden_layers"] > first_sliding


SLIDING_LAYERS = Refusal(
    "use_sliding_window", _has_sliding_layers, "full attention in every layer (false)"
)

FAMILY = Family(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    extra_keys={"use_sliding_window": False},
    refusals=(SLIDING_LAYERS,),
    layer=(
        *llama.LLAMA_LAYER,
        MapEntry(
            ("decoder.layers.{layer}.self_attention.linear_qkv.bias",),
            (
                HfTensor("model.layers.{layer}.self_attn.q_proj.bias", (Axis.QUERIES,)),
                HfTensor("model.layers.{layer}.self_attn.k_proj.bias", (Axis.KEYS,)),
                HfTensor("model.layers.{layer}.self_attn.v_proj.bias", (Axis.KEYS,)),
            ),
            WeightKind.QKV,
        ),
    ),
    add_qkv_bias=True,
)
