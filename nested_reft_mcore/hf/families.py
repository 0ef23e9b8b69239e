"""Which families there are. Nothing else in the package knows them by name."""

from __future__ import annotations

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.hf import llama, mistral, qwen2, qwen3
from nested_reft_mcore.hf.family import Family
from nested_reft_mcore.hf.weight_map import WeightMap, expand

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)
}
"""By `model_type`, which is also `ModelArchitecture.family`."""


def weight_map(architecture: ModelArchitecture) -> WeightMap:
    """The map between Megatron's and Hugging Face's tensors for `architecture`."""
    family = FAMILIES[architecture.family]
    return expand(
        family.layer,
        architecture,
        embedding=family.embedding,
        final_norm=family.final_norm,
        output=family.output,
    )
