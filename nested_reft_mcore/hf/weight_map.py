"""What a family's map is made of, and how it is read for one architecture.

A family is a tuple of `MapEntry`, written once; import and export read the same entries.
"""

from dataclasses import dataclass
from enum import Enum

from nested_reft_mcore.config.architecture import ModelArchitecture


class WeightKind(Enum):
    """How the Hugging Face tensors of an entry make one Megatron tensor, and how it is cut."""

    REPLICATED = "replicated"
    """One tensor, whole on every tensor-parallel rank."""
    ROW_PARALLEL = "row_parallel"
    """One `[out, in]` matrix, cut along its input, dimension 1."""
    QKV = "qkv"
    """Query, key and value; per key-value group its queries, its key, its value; cut by groups."""
    GATE_UP = "gate_up"
    """Gate above up; each is cut on its own, then they are stacked again."""
    VOCAB = "vocab"
    """One row per token, padded with rows of zeros, cut along dimension 0."""


@dataclass(frozen=True)
class MapEntry:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    `{layer}` in a name stands for the global 0-based layer number.
    """

    mcore_names: tuple[str, ...]
    """Names of the same parameter: in the local layer spec, then in Transformer Engine's."""
    hf_names: tuple[str, ...]
    """Tensors in the order in which the kind combines them."""
    kind: WeightKind

    def for_layer(self, layer: int) -> "MapEntry":
        """The entry with the layer number filled in."""
        return MapEntry(
            tuple(name.replace("{layer}", str(layer)) for name in self.mcore_names),
            tuple(name.replace("{layer}", str(layer)) for name in self.hf_names),
            self.kind,
        )

    @property
    def is_per_layer(self) -> bool:
        """Whether every layer has such a parameter."""
        return "{layer}" in self.mcore_names[0]


@dataclass(frozen=True)
class WeightMap:
    """The entries of one architecture, layer numbers filled in."""

    entries: tuple[MapEntry, ...]
    """In the order in which an export writes them."""
    by_mcore_name: dict[str, MapEntry]
    """Entry of a Megatron parameter with its global layer number. With tied embeddings the output
    layer's copy of the embedding on the last pipeline stage is here, and not in `entries`."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Every Hugging Face tensor that the model has, each once."""
        return tuple(name for entry in self.entries for name in entry.hf_names)


def expand(
    family: tuple[MapEntry, ...],
    architecture: ModelArchitecture,
    *,
    embedding: MapEntry,
    output: MapEntry,
) -> WeightMap:
    """The map of `architecture`: embedding, the family's entries of every layer, norm, output."""
    per_layer = [entry for entry in family if entry.is_per_layer]
    others = [entry for entry in family if not entry.is_per_layer]
    entries = [embedding]
    for layer in range(architecture.num_layers):
        entries += [entry.for_layer(layer) for entry in per_layer]
    entries += others
    tied_copy: tuple[MapEntry, ...] = ()
    if architecture.untie_embeddings_and_output_weights:
        entries.append(output)
    else:
        tied_copy = (MapEntry(output.mcore_names, embedding.hf_names, WeightKind.VOCAB),)
    by_name = {name: entry for entry in (*entries, *tied_copy) for name in entry.mcore_names}
    return WeightMap(tuple(entries), by_name)
