"""Qwen3, dense: Llama's layout, with RMSNorm over each head's query and key."""

from nested_reft_mcore.hf import llama, qwen2
from nested_reft_mcore.hf.family import Family, Refusal
from nested_reft_mcore.hf.weight_map import Axis, HfTensor, MapEntry, WeightKind

FAMILY = Family(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128},
    extra_keys={"attention_bias": False, "use_sliding_window": False},
    refusals=(
        llama.ATTENTION_BIAS,
        qwen2.SLIDING_LAYERS,
        # transformers refuses it too: the head size is never derived from the width.
        Refusal("head_dim", lambda config: config["head_dim"] is None, "a number"),
    ),
    layer=(
        *llama.LLAMA_LAYER,
        *(
            MapEntry(
                (f"decoder.layers.{{layer}}.self_attention.{letter}_layernorm.weight",),
                (HfTensor(f"model.layers.{{layer}}.self_attn.{letter}_norm.weight", (Axis.HEAD,)),),
                WeightKind.REPLICATED,
            )
            for letter in "qk"
        ),
    ),
    qk_layernorm=True,
)
