"""Llama 2 and 3: RMSNorm, grouped-query attention without biases, SwiGLU."""

from nested_reft_mcore.hf.family import Family, Refusal
from nested_reft_mcore.hf.weight_map import Axis, HfTensor, MapEntry, WeightKind

_MCORE = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

LLAMA_LAYER: tuple[MapEntry, ...] = (
    MapEntry(
        (
            _MCORE + "input_layernorm.weight",
            _MCORE + "self_attention.linear_qkv.layer_norm_weight",
        ),
        (HfTensor(_HF + "input_layernorm.weight", (Axis.HIDDEN,)),),
        WeightKind.REPLICATED,
    ),
    MapEntry(
        (_MCORE + "self_attention.linear_qkv.weight",),
        (
            HfTensor(_HF + "self_attn.q_proj.weight", (Axis.QUERIES, Axis.HIDDEN)),
            HfTensor(_HF + "self_attn.k_proj.weight", (Axis.KEYS, Axis.HIDDEN)),
            HfTensor(_HF + "self_attn.v_proj.weight", (Axis.KEYS, Axis.HIDDEN)),
        ),
        WeightKind.QKV,
    ),
    MapEntry(
        (_MCORE + "self_attention.linear_proj.weight",),
        (HfTensor(_HF + "self_attn.o_proj.weight", (Axis.HIDDEN, Axis.QUERIES)),),
        WeightKind.ROW_PARALLEL,
    ),
    MapEntry(
        (
            _MCORE + "pre_mlp_layernorm.weight",
            _MCORE + "mlp.linear_fc1.layer_norm_weight",
        ),
        (HfTensor(_HF + "post_attention_layernorm.weight", (Axis.HIDDEN,)),),
        WeightKind.REPLICATED,
    ),
    MapEntry(
        (_MCORE + "mlp.linear_fc1.weight",),
        (
            HfTensor(_HF + "mlp.gate_proj.weight", (Axis.FFN, Axis.HIDDEN)),
            HfTensor(_HF + "mlp.up_proj.weight", (Axis.FFN, Axis.HIDDEN)),
        ),
        WeightKind.GATE_UP,
    ),
    MapEntry(
        (_MCORE + "mlp.linear_fc2.weight",),
        (HfTensor(_HF + "mlp.down_proj.weight", (Axis.HIDDEN, Axis.FFN)),),
        WeightKind.ROW_PARALLEL,
    ),
)

ATTENTION_BIAS = Refusal(
    "attention_bias",
    lambda config: bool(config.get("attention_bias")),
    "attention without biases",
)

FAMILY = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    defaults={
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    extra_keys={"attention_bias": False, "mlp_bias": False},
    refusals=(ATTENTION_BIAS,),
    layer=LLAMA_LAYER,
    heads_divide_hidden=True,
)
