"""The Llama layout: RMSNorm, grouped-query attention without biases, SwiGLU."""

from nested_reft_mcore.hf.weight_map import MapEntry, WeightKind

EMBEDDING = MapEntry(
    ("embedding.word_embeddings.weight",),
    ("model.embed_tokens.weight",),
    WeightKind.VOCAB,
)
OUTPUT = MapEntry(("output_layer.weight",), ("lm_head.weight",), WeightKind.VOCAB)

LLAMA: tuple[MapEntry, ...] = (
    MapEntry(
        (
            "decoder.layers.{layer}.input_layernorm.weight",
            "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        ),
        ("model.layers.{layer}.input_layernorm.weight",),
        WeightKind.REPLICATED,
    ),
    MapEntry(
        ("decoder.layers.{layer}.self_attention.linear_qkv.weight",),
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        WeightKind.QKV,
    ),
    MapEntry(
        ("decoder.layers.{layer}.self_attention.linear_proj.weight",),
        ("model.layers.{layer}.self_attn.o_proj.weight",),
        WeightKind.ROW_PARALLEL,
    ),
    MapEntry(
        (
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        ),
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        WeightKind.REPLICATED,
    ),
    MapEntry(
        ("decoder.layers.{layer}.mlp.linear_fc1.weight",),
        (
            "model.layers.{layer}.mlp.gate_proj.weight",
            "model.layers.{layer}.mlp.up_proj.weight",
        ),
        WeightKind.GATE_UP,
    ),
    MapEntry(
        ("decoder.layers.{layer}.mlp.linear_fc2.weight",),
        ("model.layers.{layer}.mlp.down_proj.weight",),
        WeightKind.ROW_PARALLEL,
    ),
    MapEntry(
        ("decoder.final_layernorm.weight",),
        ("model.norm.weight",),
        WeightKind.REPLICATED,
    ),
)
