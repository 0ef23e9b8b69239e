"""Hugging Face files to a checkpoint and back, as streams: no model is built.

Work is shared out by bytes over all processes there are, whatever the layout. Each reads its share
from mapped files and writes it at once, so that it never holds more than a few pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nested_reft_mcore.checkpoints.manifest import FileEntry
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import STATE_FILE, write_architecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.directory_writer import ShardPlan, ShardWriter
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.tensor_checks import some
from nested_reft_mcore.hf.weight_map import WeightKind, WeightMap
from nested_reft_mcore.mcore.checkpoint_pieces import (
    PlannedPiece,
    checkpoint_key,
    checkpoint_shapes,
    extra_state_keys,
    hf_values,
    plan_pieces,
)
from nested_reft_mcore.mcore.piece_reader import PieceReader
from nested_reft_mcore.mcore.piece_writer import PieceWriter, StoredPiece, write_index

Progress = Callable[[int], None]
"""Told how many bytes more are written."""


@dataclass(frozen=True)
class WrittenShare:
    """What one process wrote of a checkpoint."""

    pieces: list[StoredPiece]
    files: list[FileEntry]
    nonfinite: list[str]
    """Hugging Face tensors that hold NaN or infinity."""


def write_share(
    directory: Path,
    reader: SafetensorsReader,
    mapping: WeightMap,
    architecture: ModelArchitecture,
    *,
    dtype: torch.dtype,
    tensor_size: int,
    rank: int,
    world_size: int,
    progress: Progress,
) -> WrittenShare:
    """Write this process's share of the pieces of a checkpoint into `directory`.

    Args:
        directory: The same on all processes, and there.
        reader: The Hugging Face directory; its tensors are checked.
        mapping: Of `architecture`.
        architecture: Shape of the model.
        dtype: What is written.
        tensor_size: Tensor-parallel size that the pieces are cut for.
        rank: This process, of `world_size`.
        world_size: Processes that share the work.
        progress: Called after every piece.
    """
    planned = plan_pieces(mapping, architecture, tensor_size, dtype.itemsize)
    nonfinite: dict[str, None] = {}
    with PieceWriter(directory, rank) as writer:
        for piece in share_out(planned, rank, world_size):
            values = piece.make(reader, architecture, dtype)
            if not _is_finite(values):
                nonfinite |= dict.fromkeys(_nonfinite(piece, reader))
            writer.add(piece.key, piece.offsets, values)
            progress(values.nbytes)
        if rank == 0:
            for key in extra_state_keys(mapping, architecture):
                writer.add_object(key, [None])
    return WrittenShare(writer.pieces, writer.files, list(nonfinite))


def checkpoint_bytes(
    mapping: WeightMap, architecture: ModelArchitecture, tensor_size: int, dtype: torch.dtype
) -> int:
    """Bytes of all tensors of a checkpoint, rows that pad the vocabulary included."""
    shapes = checkpoint_shapes(mapping, architecture, tensor_size).values()
    return sum(prod(shape) for shape in shapes) * dtype.itemsize


def finish_checkpoint(
    directory: Path,
    shares: Sequence[WrittenShare],
    mapping: WeightMap,
    architecture: ModelArchitecture,
    *,
    dtype: torch.dtype,
    tensor_size: int,
) -> None:
    """Make the shares of all processes a checkpoint: index, architecture, state."""
    pieces = [piece for share in shares for piece in share.pieces]
    write_index(directory, pieces, checkpoint_shapes(mapping, architecture, tensor_size), dtype)
    write_architecture(directory, architecture)
    (directory / STATE_FILE).write_text("{}\n", encoding="utf-8")


def check_checkpoint(
    reader: PieceReader, mapping: WeightMap, architecture: ModelArchitecture
) -> None:
    """Compare what a checkpoint's index tells of with the tensors that its architecture has.

    The number of rows that pad the vocabulary may be any.

    Raises:
        UserError: names tensors that are missing or of another shape.
    """
    expected, found = checkpoint_shapes(mapping, architecture, 1), reader.shapes
    padded = {checkpoint_key(e) for e in mapping.entries if e.kind is WeightKind.VOCAB}
    missing = [key for key in expected if key not in found]
    if missing:
        raise UserError(
            f"{reader.directory}: its tensors are not those that its architecture has: "
            f"{some('missing: ', missing)}"
        )
    for key, shape in expected.items():
        # Of the vocabulary's rows there have to be enough.
        known = (architecture.vocab_size, *shape[1:]) if key in padded else shape
        enough = found[key][0] >= known[0] if key in padded else found[key][:1] == known[:1]
        if found[key][1:] != known[1:] or not enough:
            raise UserError(
                f"{reader.directory}: {key} has shape {list(found[key])}, the architecture has "
                f"{list(known)}"
            )


def write_hf_files(
    directory: Path,
    files: Sequence[str],
    plan: ShardPlan,
    reader: PieceReader,
    mapping: WeightMap,
    architecture: ModelArchitecture,
    progress: Progress,
) -> None:
    """Write these files of a Hugging Face directory from a checkpoint."""
    entries = {
        tensor.name: (entry, which)
        for entry in mapping.entries
        for which, tensor in enumerate(entry.tensors)
    }
    blocks = (
        (name, values)
        for file in files
        for name in plan.files[file]
        for values in hf_values(*entries[name], reader, architecture)
    )
    with ShardWriter(directory, plan) as writer:
        for name, values in _read_ahead(blocks):
            writer.add(name, values)
            progress(values.nbytes)


def _read_ahead(blocks: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same blocks, the next of which is read while the present one is written."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        following = reader.submit(next, blocks, None)
        while (present := following.result()) is not None:
            following = reader.submit(next, blocks, None)
            yield present


def share_out(planned: Sequence[PlannedPiece], rank: int, world_size: int) -> list[PlannedPiece]:
    """This process's pieces, in the plan's order: the largest go first to whoever has least."""
    loads = [0] * world_size
    mine: set[int] = set()
    sizes = [prod(piece.sizes) for piece in planned]
    for number in sorted(range(len(planned)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        loads[least] += sizes[number]
        if least == rank:
            mine.add(number)
    return [piece for number, piece in enumerate(planned) if number in mine]


def _is_finite(values: Tensor) -> bool:
    # One pass without a temporary tensor; NaN wins both ways.
    if values.numel() == 0:
        return True
    least, most = torch.aminmax(values)
    return bool(torch.isfinite(least) and torch.isfinite(most))


def _nonfinite(piece: PlannedPiece, reader: SafetensorsReader) -> list[str]:
    return [name for name, box in piece.sources if not _is_finite(reader.read_box(name, box))]
