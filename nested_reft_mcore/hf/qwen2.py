"""The Qwen2 layout: Llama's, with a bias on query, key and value."""

from nested_reft_mcore.hf.llama import LLAMA_LAYER
from nested_reft_mcore.hf.weight_map import Axis, HfTensor, MapEntry, WeightKind

QWEN2_LAYER: tuple[MapEntry, ...] = (
    *LLAMA_LAYER,
    MapEntry(
        ("decoder.layers.{layer}.self_attention.linear_qkv.bias",),
        (
            HfTensor("model.layers.{layer}.self_attn.q_proj.bias", (Axis.QUERIES,)),
            HfTensor("model.layers.{layer}.self_attn.k_proj.bias", (Axis.KEYS,)),
            HfTensor("model.layers.{layer}.self_attn.v_proj.bias", (Axis.KEYS,)),
        ),
        WeightKind.QKV,
    ),
)
