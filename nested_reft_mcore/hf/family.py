"""What one model family is made of: all that `hf/` has to know to read and write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nested_reft_mcore.hf.weight_map import Axis, HfTensor, MapEntry, WeightKind

EMBEDDING = MapEntry(
    ("embedding.word_embeddings.weight",),
    (HfTensor("model.embed_tokens.weight", (Axis.VOCAB, Axis.HIDDEN)),),
    WeightKind.VOCAB,
)
FINAL_NORM = MapEntry(
    ("decoder.final_layernorm.weight",),
    (HfTensor("model.norm.weight", (Axis.HIDDEN,)),),
    WeightKind.REPLICATED,
)
OUTPUT = MapEntry(
    ("output_layer.weight",),
    (HfTensor("lm_head.weight", (Axis.VOCAB, Axis.HIDDEN)),),
    WeightKind.VOCAB,
)


@dataclass(frozen=True)
class Refusal:
    """An option of `config.json` whose value asks for what the family does not compute here."""

    key: str
    """Name of the option."""
    applies: Callable[[Mapping[str, Any]], bool]
    """Whether a configuration asks for it. Absent keys are filled in with `Family.defaults`."""
    supported: str
    """What would be accepted, in words."""


@dataclass(frozen=True)
class Family:
    """The Hugging Face layout of a model family: its configuration and its tensors."""

    model_type: str
    """As in `config.json`, and as `ModelArchitecture.family` has it."""
    class_name: str
    """The class of transformers that an exported model names."""
    defaults: Mapping[str, Any]
    """What transformers 5 takes absent keys of `config.json` to mean. A key that is not here means
    null."""
    extra_keys: Mapping[str, Any]
    """Keys of an exported `config.json` beside those that all families have."""
    refusals: tuple[Refusal, ...]
    """What is refused, beside what all families refuse."""
    layer: tuple[MapEntry, ...]
    """The map of one layer; `{layer}` in a name stands for its number."""
    embedding: MapEntry = EMBEDDING
    """The map of the token embedding."""
    final_norm: MapEntry = FINAL_NORM
    """The map of the norm after the last layer."""
    output: MapEntry = OUTPUT
    """The map of the output layer, where it has weights of its own."""
    add_qkv_bias: bool = False
    """Whether query, key and value projections have a bias."""
    qk_layernorm: bool = False
    """Whether each head's query and key are normed."""
    heads_divide_hidden: bool = False
    """Whether transformers refuses a width that is no multiple of the number of heads."""
