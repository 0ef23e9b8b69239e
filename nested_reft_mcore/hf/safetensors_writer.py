"""Write a safetensors file piece by piece, so that no more than a piece is ever held in memory.

The format (https://huggingface.co/docs/safetensors) is a little-endian 64-bit length, a JSON header
of names, types, shapes and byte ranges, and the tensors' bytes. The header depends on shapes alone,
so it can stand before a single value is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from nested_reft_mcore.checkpoints.durable_file import DurableFile
from nested_reft_mcore.hf.weight_map import Shape

_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


class SafetensorsWriter:
    """A file that takes the values of its tensors in the order of `shapes`. A context manager."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        """Plan the file.

        Args:
            path: Written when the context is entered.
            shapes: Every tensor, in the order in which the values will come.
            dtype: float32, bfloat16 or float16, of all tensors.
        """
        self._path = path
        self._dtype = dtype
        self._waiting = [(name, prod(shape)) for name, shape in shapes.items()]
        self._waiting.reverse()
        self._header = _header(shapes, dtype)
        self._stack = ExitStack()

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._stack.enter_context(DurableFile(self._path, checksum=False))
        self._file.write(self._header)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        if kind is None and self._waiting:
            raise ValueError(f"tensors were never added: {self._waiting[-1][0]} and on")

    def add(self, name: str, values: Tensor) -> None:
        """Append values of tensor `name`: all of them, or the next rows.

        Raises:
            ValueError: it is another tensor's turn, or there are too many values.
        """
        expected, missing = self._waiting[-1] if self._waiting else ("the end", 0)
        if name != expected or values.numel() > missing:
            raise ValueError(
                f"{self._path.name}: expected up to {missing} values of {expected}, got "
                f"{values.numel()} of {name}"
            )
        values = values.detach().to("cpu", self._dtype).contiguous()
        self._file.write(values.view(-1).view(torch.uint8).numpy())
        if values.numel() == missing:
            self._waiting.pop()
        else:
            self._waiting[-1] = (name, missing - values.numel())


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
