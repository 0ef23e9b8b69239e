"""Tensors of a Hugging Face directory, read part by part, from safetensors and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.config import read_json_object
from nested_reft_mcore.hf.transforms import TensorPart
from nested_reft_mcore.hf.weight_map import Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class SafetensorsReader:
    """The tensors of one directory, in one file or in shards with an index.

    Files are memory-mapped and opened when they are first needed; a part that is not asked for is
    not read. Use it as a context manager.
    """

    def __init__(self, hf_dir: Path) -> None:
        """Find the files.

        Raises:
            UserError: there are none, or the index does not fit them.
        """
        self._hf_dir = hf_dir
        self._open_files = ExitStack()
        self._handles: dict[str, Any] = {}
        if (hf_dir / INDEX_FILE).exists():
            self._file_of = _read_index(hf_dir)
        elif (hf_dir / SINGLE_FILE).exists():
            self._file_of = dict.fromkeys(self._handle(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            raise UserError(
                f"{hf_dir}: no {SINGLE_FILE} and no {INDEX_FILE}; weights are read from "
                "safetensors only (pickled .bin files are refused)"
            )

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()
        self._open_files.close()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it.

        Raises:
            UserError: it is not a floating-point type that weights have here.
        """
        found = self._slice(name).get_dtype()
        if found not in _TYPES:
            raise UserError(
                f"{self._hf_dir / self._file_of[name]}: {name} is of type {found}; expected one "
                f"of {', '.join(_TYPES)}"
            )
        return _TYPES[found]

    def read(self, name: str, part: TensorPart | None = None) -> Tensor:
        """A tensor or a part of it, on the CPU, of the dtype that the file has.

        What comes back is a view of the mapped file: it costs no memory of the process's own.
        """
        if part is None:
            return self._slice(name)[:]
        start, stop = part.start, part.stop
        return self.read_box(name, ((0, None),) * part.dim + ((start, stop),))

    def read_box(self, name: str, box: Sequence[tuple[int, int | None]]) -> Tensor:
        """The part of a tensor within `(start, stop)` of its first dimensions, as `read` does."""
        # safetensors refuses an empty slice; padding may leave a rank nothing to read.
        empty = [dim for dim, (start, stop) in enumerate(box) if start == stop]
        index = tuple(
            slice(0, 1) if dim in empty else slice(start, stop)
            for dim, (start, stop) in enumerate(box)
        )
        tensor: Tensor = self._slice(name)[index]
        for dim in empty:
            tensor = tensor.narrow(dim, 0, 0)
        return tensor

    def _slice(self, name: str) -> Any:
        file_name = self._file_of[name]
        try:
            return self._handle(file_name).get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self._hf_dir / file_name}: no tensor {name}, which {INDEX_FILE} puts there"
            ) from error

    def _handle(self, file_name: str) -> Any:
        if file_name not in self._handles:
            path = self._hf_dir / file_name
            try:
                opened = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError as error:
                raise UserError(f"{path}: no such file, but {INDEX_FILE} names it") from error
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a safetensors file: {error}") from error
            self._handles[file_name] = self._open_files.enter_context(opened)
        return self._handles[file_name]


def _read_index(hf_dir: Path) -> dict[str, str]:
    """File name of each tensor."""
    path = hf_dir / INDEX_FILE
    file_of = read_json_object(path).get("weight_map")
    if not isinstance(file_of, dict):
        raise UserError(f"{path}: weight_map: expected an object of tensor and file names")
    for name, file_name in file_of.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise UserError(
                f"{path}: weight_map.{name}: expected the name of a file in the same directory, "
                f"found {file_name!r}"
            )
    return file_of
