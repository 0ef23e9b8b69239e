"""Which map serves which family."""

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.hf.llama import EMBEDDING, FINAL_NORM, LLAMA_LAYER, OUTPUT
from nested_reft_mcore.hf.qwen2 import QWEN2_LAYER
from nested_reft_mcore.hf.weight_map import WeightMap, expand

_LAYER_ENTRIES = {"llama": LLAMA_LAYER, "qwen2": QWEN2_LAYER}


def weight_map(architecture: ModelArchitecture) -> WeightMap:
    """The map between Megatron's and Hugging Face's tensors for `architecture`."""
    return expand(
        _LAYER_ENTRIES[architecture.family],
        architecture,
        embedding=EMBEDDING,
        final_norm=FINAL_NORM,
        output=OUTPUT,
    )
