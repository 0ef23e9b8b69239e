"""Which pieces a checkpoint's tensors are made of, and how Hugging Face tensors make them.

In a checkpoint the layers of a model are stacked: `decoder.layers.mlp.linear_fc2.weight` has one
axis more than the parameter, and the global layer number is the place on it. Pieces are cut where
tensor parallelism of the size asked for cuts, so that a rank of such a run reads its own pieces and
no others; and again along rows, so that none is large. Any other layout can be read from them too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.transforms import from_mcore, pad_rows, padded_vocab_size, to_mcore
from nested_reft_mcore.hf.weight_map import MapEntry, Shape, WeightKind, WeightMap
from nested_reft_mcore.mcore.piece_reader import PieceReader

MAX_PIECE_BYTES = 2**27
_LAYER = re.compile(r"(?<=decoder\.layers)\.\d+(?=\.)")
_LINEAR = re.compile(r"decoder\.layers\..*\.linear_[a-z0-9]+(?=\.weight$)")
Box = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class PlannedPiece:
    """A piece to be made from parts of Hugging Face tensors."""

    key: str
    offsets: Shape
    sizes: Shape
    kind: WeightKind
    sources: tuple[tuple[str, Box], ...]
    """Tensor names, and (start, stop) of the part in their first dimensions."""

    def make(
        self, reader: SafetensorsReader, architecture: ModelArchitecture, dtype: torch.dtype
    ) -> Tensor:
        """Its values, of shape `sizes`; a view of the file where nothing has to be moved."""
        parts = [reader.read_box(name, box) for name, box in self.sources]
        if self.kind is WeightKind.QKV:
            values = to_mcore(self.kind, parts, architecture)
        else:
            (values,) = parts
        if self.kind is WeightKind.VOCAB:
            values = pad_rows(values, self.sizes[0])
        return values.to(dtype).contiguous().view(self.sizes)


def checkpoint_key(entry: MapEntry) -> str:
    """Name of an entry's tensor in a checkpoint, the same for every layer spec."""
    return _LAYER.sub("", entry.mcore_names[-1])


def checkpoint_shapes(
    mapping: WeightMap, architecture: ModelArchitecture, tensor_size: int
) -> dict[str, Shape]:
    """Whole shape of every tensor of a checkpoint for this tensor-parallel size."""
    shapes: dict[str, Shape] = {}
    for entry in mapping.entries:
        shape = entry.full_shape(architecture)
        if entry.kind is WeightKind.VOCAB:
            shape = (padded_vocab_size(shape[0], tensor_size), *shape[1:])
        stacked = () if entry.layer is None else (architecture.num_layers,)
        shapes[checkpoint_key(entry)] = (*stacked, *shape)
    return shapes


def extra_state_keys(mapping: WeightMap, architecture: ModelArchitecture) -> list[str]:
    """The objects beside matrices, empty but for FP8 scales of Transformer Engine.

    Megatron refuses a checkpoint without them.
    """
    count = architecture.num_layers
    names = [(entry, _LINEAR.match(entry.mcore_names[-1])) for entry in mapping.entries]
    return [
        f"{_LAYER.sub('', match.group())}._extra_state/shard_{entry.layer}_{count}"
        for entry, match in names
        if match is not None
    ]


def plan_pieces(
    mapping: WeightMap, architecture: ModelArchitecture, tensor_size: int, element_bytes: int
) -> list[PlannedPiece]:
    """Every piece of a model's checkpoint, cut for `tensor_size` tensor-parallel ranks."""
    return [
        piece
        for entry in mapping.entries
        for rank in range(tensor_size)
        for piece in _pieces(entry, architecture, rank, tensor_size, element_bytes)
    ]


def hf_values(
    entry: MapEntry, which: int, reader: PieceReader, architecture: ModelArchitecture
) -> Iterator[Tensor]:
    """The values of Hugging Face tensor `which` of an entry, in blocks of consecutive rows."""
    key = checkpoint_key(entry)
    layer = () if entry.layer is None else (entry.layer,)
    shape = entry.tensors[which].shape(architecture)
    if entry.kind is WeightKind.QKV:
        full = entry.full_shape(architecture)
        values = reader.read(key, (*layer, *(0 for _ in full)), (*(1 for _ in layer), *full))
        yield from_mcore(entry.kind, values.view(full), architecture)[which]
        return
    first = sum(tensor.shape(architecture)[0] for tensor in entry.tensors[:which])
    last = first + shape[0]
    # A vector is the last axis of what the checkpoint holds, and never large.
    cuts = [first, last]
    if len(shape) > 1:
        cuts[1:1] = [cut for cut in reader.row_cuts(key) if first < cut < last]
    for start, stop in pairwise(cuts):
        offsets = (*layer, start, *(0 for _ in shape[1:]))
        sizes = (*(1 for _ in layer), stop - start, *shape[1:])
        yield reader.read(key, offsets, sizes)


def _pieces(
    entry: MapEntry, architecture: ModelArchitecture, rank: int, size: int, element_bytes: int
) -> Iterator[PlannedPiece]:
    """The pieces that tensor-parallel rank `rank` of `size` would write."""
    shape = entry.full_shape(architecture)
    columns = [(0, extent) for extent in shape[1:]]
    if entry.kind is WeightKind.REPLICATED and rank > 0:
        return
    if entry.kind is WeightKind.ROW_PARALLEL:
        columns = [_share(shape[1], rank, size)]
    width = element_bytes
    for start, stop in columns:
        width *= stop - start
    if entry.kind is WeightKind.QKV:
        yield from _qkv_pieces(entry, architecture, rank, size, width)
        return
    first = 0
    for tensor in entry.tensors:
        rows = tensor.shape(architecture)[0]
        if entry.kind in (WeightKind.REPLICATED, WeightKind.ROW_PARALLEL):
            bounds = (0, rows)
        elif entry.kind is WeightKind.VOCAB:
            bounds = _share(padded_vocab_size(rows, size), rank, size)
        else:
            bounds = _share(rows, rank, size)
        for start, stop in _blocks(*bounds, row_bytes=width):
            box = ((min(start, rows), min(stop, rows)), *columns)
            yield _piece(entry, first + start, stop - start, columns, ((tensor.name, box),))
        first += rows


def _qkv_pieces(
    entry: MapEntry, architecture: ModelArchitecture, rank: int, size: int, width: int
) -> Iterator[PlannedPiece]:
    """Whole groups: queries, key and value of each lie together."""
    head = architecture.head_dim
    heads = architecture.num_attention_heads // architecture.num_query_groups
    columns = [(0, extent) for extent in entry.full_shape(architecture)[1:]]
    rows = (heads + 2) * head
    groups = _share(architecture.num_query_groups, rank, size)
    for start, stop in _blocks(*groups, row_bytes=rows * width):
        sources = tuple(
            (tensor.name, ((start * unit, stop * unit), *columns))
            for tensor, unit in zip(entry.tensors, (heads * head, head, head), strict=True)
        )
        yield _piece(entry, start * rows, (stop - start) * rows, columns, sources)


def _piece(
    entry: MapEntry,
    first_row: int,
    num_rows: int,
    columns: list[tuple[int, int]],
    sources: tuple[tuple[str, Box], ...],
) -> PlannedPiece:
    layer = () if entry.layer is None else (entry.layer,)
    return PlannedPiece(
        key=checkpoint_key(entry),
        offsets=(*layer, first_row, *(start for start, _ in columns)),
        sizes=(*(1 for _ in layer), num_rows, *(stop - start for start, stop in columns)),
        kind=entry.kind,
        sources=sources,
    )


def _share(count: int, rank: int, size: int) -> tuple[int, int]:
    part = count // size
    return rank * part, (rank + 1) * part


def _blocks(start: int, stop: int, *, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks that are no larger than a piece may be."""
    step = max(1, MAX_PIECE_BYTES // row_bytes)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
