"""The Qwen2 layout: Llama's, with a bias on query, key and value."""

from nested_reft_mcore.hf.llama import LLAMA
from nested_reft_mcore.hf.weight_map import MapEntry, WeightKind

QWEN2: tuple[MapEntry, ...] = (
    *LLAMA,
    MapEntry(
        ("decoder.layers.{layer}.self_attention.linear_qkv.bias",),
        (
            "model.layers.{layer}.self_attn.q_proj.bias",
            "model.layers.{layer}.self_attn.k_proj.bias",
            "model.layers.{layer}.self_attn.v_proj.bias",
        ),
        WeightKind.QKV,
    ),
)
