"""Read Megatron's checkpoint format `torch_dist` one piece at a time, whoever wrote it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.weight_map import Shape
from nested_reft_mcore.mcore.checkpoint_safety import INDEX_FILE, read_index
from nested_reft_mcore.mcore.piece_writer import piece_index


class PieceReader:
    """Reads boxes of the tensors of a checkpoint, whoever wrote it. A context manager.

    The last piece that was read is kept, because the next box is often in it too.
    """

    def __init__(self, directory: Path) -> None:
        """Read the index.

        Raises:
            UserError: it is missing, broken or not only data.
        """
        self.directory = directory
        """Of the checkpoint."""
        self._metadata = read_index(directory)
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()
        self._last: tuple[MetadataIndex, Tensor] | None = None

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._last = None
        self._stack.close()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Whole shape of every tensor."""
        return {key: tuple(tensor.size) for key, tensor in self._tensors()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of every tensor."""
        return {key: tensor.properties.dtype for key, tensor in self._tensors()}

    @property
    def num_pieces(self) -> dict[str, int]:
        """How many pieces every tensor lies in."""
        return {key: len(tensor.chunks) for key, tensor in self._tensors()}

    def row_cuts(self, key: str) -> list[int]:
        """Where rows begin a new piece, from 0 to the number of rows: reading between them is best.

        Rows are the second last of a tensor's axes.
        """
        tensor = self._tensor(key)
        cuts = {chunk.offsets[-2] for chunk in tensor.chunks}
        return sorted(cuts | {0, tensor.size[-2]})

    def read(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        """The box of `sizes` that begins at `offsets` of tensor `key`, on the CPU.

        Raises:
            UserError: there is no such tensor, a part of the box is in no piece, or the file with
                it is missing or broken.
        """
        tensor = self._tensor(key)
        box = torch.empty(sizes, dtype=tensor.properties.dtype)
        missing = box.numel()
        for chunk in tensor.chunks:
            overlap = _overlap(offsets, sizes, tuple(chunk.offsets), tuple(chunk.sizes))
            if overlap is None:
                continue
            start, extent = overlap
            piece = self._piece(key, tuple(chunk.offsets), tuple(chunk.sizes))
            if start == offsets and extent == sizes == tuple(piece.shape):
                return piece
            source = _narrow(piece, _minus(start, tuple(chunk.offsets)), extent)
            _narrow(box, _minus(start, offsets), extent).copy_(source)
            missing -= source.numel()
        if missing:
            raise UserError(
                f"{self.directory / INDEX_FILE}: {key}: {missing} of {box.numel()} values at "
                f"{list(offsets)} are in no piece"
            )
        return box

    def _tensors(self) -> Iterator[tuple[str, TensorStorageMetadata]]:
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                yield key, entry

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.directory}: has no tensor {key}")
        return entry

    def _piece(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        index = piece_index(key, offsets)
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        # Free the one before first.
        self._last = None
        place = self._metadata.storage_data.get(index)
        if place is None:
            raise UserError(f"{self.directory / INDEX_FILE}: {key}: a piece has no place")
        path = self.directory / place.relative_path
        try:
            section = _FileSection(self._open(place.relative_path), place.offset, place.length)
            loaded = torch.load(section, map_location="cpu", weights_only=True)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        # A broken file can raise nearly anything.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{path}: broken at byte {place.offset}: {reason}") from error
        if not isinstance(loaded, Tensor) or tuple(loaded.shape) != sizes:
            raise UserError(f"{path}: {key}: is not the piece that {INDEX_FILE} tells of")
        self._last = (index, loaded)
        return loaded

    def _open(self, name: str) -> BinaryIO:
        if Path(name).name != name:
            raise UserError(f"{self.directory / INDEX_FILE}: names the file {name!r} elsewhere")
        if name not in self._files:
            self._files[name] = self._stack.enter_context((self.directory / name).open("rb"))
        return self._files[name]


class _FileSection(io.RawIOBase):
    """Bytes `start` to `start + length` of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        """As any file's."""
        return True

    def seekable(self) -> bool:
        """As any file's."""
        return True

    def tell(self) -> int:
        """As any file's."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As any file's."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """As any file's."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._length - self._place)]
        self._file.seek(self._start + self._place)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._place += count
        return count


def _overlap(
    offsets: Shape, sizes: Shape, other_offsets: Shape, other_sizes: Shape
) -> tuple[Shape, Shape] | None:
    """First element and extent of what two boxes share."""
    start = tuple(map(max, offsets, other_offsets))
    stop = tuple(
        min(a + n, b + m)
        for a, n, b, m in zip(offsets, sizes, other_offsets, other_sizes, strict=True)
    )
    extent = _minus(stop, start)
    return (start, extent) if min(extent, default=1) > 0 else None


def _minus(one: Shape, other: Shape) -> Shape:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _narrow(tensor: Tensor, offsets: Shape, sizes: Shape) -> Tensor:
    for axis, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(axis, start, size)
    return tensor
