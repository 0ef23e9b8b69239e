"""Which map serves which family."""

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.hf.llama import EMBEDDING, LLAMA, OUTPUT
from nested_reft_mcore.hf.qwen2 import QWEN2
from nested_reft_mcore.hf.weight_map import WeightMap, expand

_FAMILIES = {"llama": LLAMA, "qwen2": QWEN2}


def weight_map(architecture: ModelArchitecture) -> WeightMap:
    """The map between Megatron's and Hugging Face's tensors for `architecture`."""
    return expand(_FAMILIES[architecture.family], architecture, embedding=EMBEDDING, output=OUTPUT)
