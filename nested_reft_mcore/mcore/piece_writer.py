"""Write Megatron's checkpoint format `torch_dist` one piece at a time.

Megatron's own writer wants a process's whole share of a model in memory. A conversion does not need
that: a checkpoint is an index, `.metadata`, and files in which the pieces of tensors lie one behind
the other, each as `torch.save` writes it (torch.distributed.checkpoint). `piece_reader` reads it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nested_reft_mcore.checkpoints.durable_file import DurableFile
from nested_reft_mcore.checkpoints.manifest import FileEntry
from nested_reft_mcore.hf.weight_map import Shape
from nested_reft_mcore.mcore.checkpoint_safety import INDEX_FILE

_MAX_FILE_BYTES = 8 * 10**9


@dataclass(frozen=True)
class StoredPiece:
    """Where a piece of a tensor, or an object, lies."""

    key: str
    offsets: Shape | None
    """Its first element in the whole tensor; None for an object."""
    sizes: Shape
    file: str
    start: int
    length: int


class PieceWriter:
    """Writes one process's pieces into files of its own. A context manager."""

    def __init__(self, directory: Path, rank: int) -> None:
        """Write `__<rank>_<n>.distcp` into `directory`, which is there."""
        self._directory = directory
        self._rank = rank
        self._stack = ExitStack()
        self._file: DurableFile | None = None
        self._name = ""
        self.pieces: list[StoredPiece] = []
        """What was written."""
        self.files: list[FileEntry] = []
        """Files that are on the disk: all of them, once the context is left."""

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._close_file()
        else:
            self._stack.__exit__(kind, error, traceback)

    def add(self, key: str, offsets: Shape, values: Tensor) -> None:
        """Write the piece of tensor `key` that begins at `offsets`; `values` has all its axes."""
        if values.untyped_storage().nbytes() != values.nbytes:
            # torch.save writes the whole storage that a view looks at.
            values = values.clone()
        self._write(key, offsets, tuple(values.shape), values)

    def add_object(self, key: str, value: Any) -> None:
        """Write an object."""
        self._write(key, None, (), value)

    def _write(self, key: str, offsets: Shape | None, sizes: Shape, value: Any) -> None:
        if self._file is not None and self._file.tell() >= _MAX_FILE_BYTES:
            self._close_file()
        if self._file is None:
            self._name = f"__{self._rank}_{len(self.files)}.distcp"
            file = DurableFile(self._directory / self._name, checksum=True)
            self._file = self._stack.enter_context(file)
        start = self._file.tell()
        try:
            with _without_crc32():
                torch.save(value, self._file)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            # torch's writer complains of a file that has not grown, and hides why.
            if self._file.failure is not None:
                raise self._file.failure from None
            raise
        length = self._file.tell() - start
        self.pieces.append(StoredPiece(key, offsets, sizes, self._name, start, length))

    def _close_file(self) -> None:
        if self._file is not None:
            self._stack.close()
            self.files.append(FileEntry(self._name, self._file.tell(), self._file.sha256))
            self._file = None


def write_index(
    directory: Path,
    pieces: Sequence[StoredPiece],
    shapes: dict[str, Shape],
    dtype: torch.dtype,
) -> None:
    """Make a directory of pieces a checkpoint; the small files are the caller's to fsync.

    Args:
        directory: Where the files of all processes are.
        pieces: Of all processes.
        shapes: Whole shape of every tensor.
        dtype: Of all tensors.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for piece in pieces:
        if piece.offsets is not None:
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
            chunks.setdefault(piece.key, []).append(chunk)
    properties = TensorProperties(dtype=dtype)
    tensors = {
        key: TensorStorageMetadata(properties, torch.Size(shapes[key]), chunks[key])
        for key in chunks
    }
    objects = {piece.key: BytesStorageMetadata() for piece in pieces if piece.offsets is None}
    places = {
        piece_index(piece.key, piece.offsets): _StorageInfo(piece.file, piece.start, piece.length)
        for piece in pieces
    }
    metadata = Metadata({**tensors, **objects}, planner_data={}, storage_data=places)
    (directory / INDEX_FILE).write_bytes(pickle.dumps(metadata))
    torch.save({}, directory / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in backends}
    (directory / "metadata.json").write_text(json.dumps(backends | versions), encoding="utf-8")


@contextmanager
def _without_crc32() -> Iterator[None]:
    """torch.load does not look at the checksums of the zip format, and they cost most of a save."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def piece_index(key: str, offsets: Shape | None) -> MetadataIndex:
    """The index's name for a piece of a tensor, or for an object."""
    return MetadataIndex(key, None if offsets is None else torch.Size(offsets))
