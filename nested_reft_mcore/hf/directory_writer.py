"""The files of a Hugging Face directory: which tensor goes where, and writing them in turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nested_reft_mcore.hf.safetensors_reader import INDEX_FILE, SINGLE_FILE
from nested_reft_mcore.hf.safetensors_writer import SafetensorsWriter
from nested_reft_mcore.hf.weight_map import Shape

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ShardPlan:
    """Which tensors go into which file of weights."""

    files: dict[str, dict[str, Shape]]
    """By file name, its tensors in the order in which they are written."""
    dtype: torch.dtype
    """Of every tensor."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        shapes = [shape for tensors in self.files.values() for shape in tensors.values()]
        return sum(prod(shape) for shape in shapes) * self.dtype.itemsize

    @property
    def file_of(self) -> dict[str, str]:
        """File name by tensor name."""
        return {name: file for file, tensors in self.files.items() for name in tensors}

    def files_of(self, rank: int, world_size: int) -> list[str]:
        """What one of several writers writes: whole files, shared out evenly in turn."""
        return list(self.files)[rank::world_size]

    def finish(self, directory: Path) -> None:
        """Check that every file is there, and write the index that several files need.

        Raises:
            ValueError: a file was never written.
        """
        missing = [file for file in self.files if not (directory / file).is_file()]
        if missing:
            raise ValueError(f"files were never written: {', '.join(missing[:5])}")
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self.file_of}
            write_json(directory / INDEX_FILE, index)


def plan_shards(
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    num_writers: int = 1,
) -> ShardPlan:
    """Put tensors into files, in the order given and each filled up to the limit.

    Args:
        shapes: Every tensor.
        dtype: Of all of them.
        max_shard_bytes: A file holds no more, unless a single tensor does.
        num_writers: Files are made smaller than the limit where that gives each writer one.

    Raises:
        ValueError: the limit is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: expected more than 0, found {max_shard_bytes}")
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    limit = min(max_shard_bytes, -(-sum(sizes.values()) // num_writers))
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    names = [SINGLE_FILE]
    if len(groups) > 1:
        count = len(groups)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = {
        file: {name: shapes[name] for name in group}
        for file, group in zip(names, groups, strict=True)
    }
    return ShardPlan(files, dtype)


class ShardWriter:
    """Writes files of a plan, tensor by tensor in the plan's order. A context manager.

    Holds no tensor longer than the call that brings it.
    """

    def __init__(self, directory: Path, plan: ShardPlan) -> None:
        """Write into `directory`, which is there."""
        self._directory = directory
        self._plan = plan
        self._file_of = plan.file_of
        self._open: tuple[str, SafetensorsWriter] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def add(self, name: str, values: Tensor) -> None:
        """Take a tensor, or its next rows; they become of the plan's type.

        Raises:
            ValueError: tensors come in another order than the plan's.
        """
        file = self._file_of[name]
        if self._open is None or self._open[0] != file:
            # Closes the file before, which has to be complete.
            self._stack.close()
            writer = SafetensorsWriter(
                self._directory / file, self._plan.files[file], self._plan.dtype
            )
            self._open = (file, self._stack.enter_context(writer))
        self._open[1].add(name, values)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
