"""What a family's map is made of, and how it is read for one architecture.

A family is a tuple of `MapEntry`, written once; import and export read the same entries.
"""

from dataclasses import dataclass, replace
from enum import Enum

from nested_reft_mcore.config.architecture import ModelArchitecture

Shape = tuple[int, ...]


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


class Axis(Enum):
    """What a dimension of a Hugging Face tensor counts."""

    HIDDEN = "hidden"
    QUERIES = "queries"
    KEYS = "keys"
    HEAD = "head"
    FFN = "ffn"
    VOCAB = "vocab"

    def size(self, architecture: ModelArchitecture) -> int:
        """Its length in a model of this architecture."""
        sizes = {
            Axis.HIDDEN: architecture.hidden_size,
            Axis.QUERIES: architecture.num_attention_heads * architecture.head_dim,
            Axis.KEYS: architecture.num_query_groups * architecture.head_dim,
            Axis.HEAD: architecture.head_dim,
            Axis.FFN: architecture.ffn_hidden_size,
            Axis.VOCAB: architecture.vocab_size,
        }
        return sizes[self]


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor: its name, and what each of its dimensions counts."""

    name: str
    axes: tuple[Axis, ...]

    def shape(self, architecture: ModelArchitecture) -> Shape:
        """Its shape in a model of this architecture."""
        return tuple(axis.size(architecture) for axis in self.axes)


@dataclass(frozen=True)
class MapEntry:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    `{layer}` in a name stands for the global 0-based layer number.
    """

    mcore_names: tuple[str, ...]
    """Names of the same parameter: in the local layer spec, then in Transformer Engine's."""
    tensors: tuple[HfTensor, ...]
    """In the order in which the kind combines them."""
    kind: WeightKind
    layer: int | None = None
    """Global layer that it belongs to, once the number is filled in."""

    def for_layer(self, layer: int) -> "MapEntry":
        """The entry with the layer number filled in."""
        tensors = tuple(
            HfTensor(tensor.name.replace("{layer}", str(layer)), tensor.axes)
            for tensor in self.tensors
        )
        names = tuple(name.replace("{layer}", str(layer)) for name in self.mcore_names)
        return replace(self, mcore_names=names, tensors=tensors, layer=layer)

    def full_shape(self, architecture: ModelArchitecture) -> Shape:
        """Shape of the Megatron tensor, neither cut nor padded: the parts stand on one another."""
        shapes = [tensor.shape(architecture) for tensor in self.tensors]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class WeightMap:
    """The entries of one architecture, layer numbers filled in."""

    entries: tuple[MapEntry, ...]
    """In the order in which an export writes them."""
    by_mcore_name: dict[str, MapEntry]
    """Entry of a Megatron parameter with its global layer number. With tied embeddings the output
    layer's copy of the embedding on the last pipeline stage is here, and not in `entries`."""
    hf_shapes: dict[str, Shape]
    """Every Hugging Face tensor that the model has, in the order of an export."""


def expand(
    per_layer: tuple[MapEntry, ...],
    architecture: ModelArchitecture,
    *,
    embedding: MapEntry,
    final_norm: MapEntry,
    output: MapEntry,
) -> WeightMap:
    """The map of `architecture`: embedding, every layer, final norm, and the output if untied."""
    entries = [embedding]
    for layer in range(architecture.num_layers):
        entries += [entry.for_layer(layer) for entry in per_layer]
    entries.append(final_norm)
    tied_copy: tuple[MapEntry, ...] = ()
    if architecture.untie_embeddings_and_output_weights:
        entries.append(output)
    else:
        tied_copy = (replace(output, tensors=embedding.tensors),)
    by_name = {name: entry for entry in (*entries, *tied_copy) for name in entry.mcore_names}
    shapes = {
        tensor.name: tensor.shape(architecture) for entry in entries for tensor in entry.tensors
    }
    return WeightMap(tuple(entries), by_name, shapes)
