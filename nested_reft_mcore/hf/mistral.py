"""Mistral without its sliding window: Llama's layout."""

from nested_reft_mcore.hf import llama
from nested_reft_mcore.hf.family import Family, Refusal

FAMILY = Family(
    model_type="mistral",
    class_name="MistralForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        # An absent window is one of 4096: transformers looks no further than the last 4096 tokens.
        "sliding_window": 4096,
    },
    extra_keys={"sliding_window": None},
    refusals=(
        llama.ATTENTION_BIAS,
        Refusal(
            "sliding_window",
            lambda config: config["sliding_window"] is not None,
            "full attention in every layer (null)",
        ),
    ),
    layer=llama.LLAMA_LAYER,
)
