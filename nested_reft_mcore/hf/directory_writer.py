"""Write a Hugging Face directory: sharded safetensors, configs, tokenizer; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.safetensors_reader import INDEX_FILE, SINGLE_FILE
from nested_reft_mcore.hf.tokenizer_files import copy_tokenizer_files
from nested_reft_mcore.hf.weight_map import Shape

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


class HfDirectoryWriter:
    """A context in which a directory is written aside; leaving it without error puts it in place.

    At most one shard's tensors are held in memory.
    """

    def __init__(
        self,
        output_dir: Path,
        shapes: Mapping[str, Shape],
        dtype: torch.dtype,
        *,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
        force: bool = False,
    ) -> None:
        """Plan the shards.

        Args:
            output_dir: must not exist, or be empty, unless `force`.
            shapes: every tensor that will be added.
            dtype: what tensors are written as.
            max_shard_bytes: a file holds no more, unless a single tensor does.
            force: replace a Hugging Face directory that is there.

        Raises:
            UserError: `output_dir` is taken, or the limit is not positive.
        """
        check_output_is_free(output_dir, force=force)
        if max_shard_bytes <= 0:
            raise UserError(f"max shard size: expected more than 0 bytes, found {max_shard_bytes}")
        output_dir = output_dir.resolve()
        self._output_dir = output_dir
        self._aside = output_dir.parent / f".{output_dir.name}.partial-{os.getpid()}"
        self._dtype = dtype
        self._waiting: dict[str, Tensor] = {}
        num_elements = sum(torch.Size(shape).numel() for shape in shapes.values())
        self._num_bytes = num_elements * dtype.itemsize
        self._shards = plan_shards(shapes, dtype, max_shard_bytes)
        self._shard_of = {name: file for file, names in self._shards.items() for name in names}

    def __enter__(self) -> HfDirectoryWriter:
        self._aside.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._aside, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; a shard is written as soon as all of it is there."""
        # A copy of its own: safetensors refuses tensors that share memory.
        self._waiting[name] = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
        file_name = self._shard_of[name]
        names = self._shards[file_name]
        if all(other in self._waiting for other in names):
            path = self._aside / file_name
            content = {other: self._waiting.pop(other) for other in names}
            save_file(content, path, metadata={"format": "pt"})
            # safetensors makes files that only the owner reads; take the mode of other new files.
            path.chmod(self._aside.stat().st_mode & 0o666)

    def write_json(self, file_name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the directory."""
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (self._aside / file_name).write_text(text, encoding="utf-8")

    def copy_tokenizer(self, source: Path) -> None:
        """Copy the tokenizer that is in, or is, `source`: see `copy_tokenizer_files`."""
        copy_tokenizer_files(source, self._aside)

    def _publish(self) -> None:
        missing = [
            name for name, file in self._shard_of.items() if not (self._aside / file).exists()
        ]
        if missing:
            raise ValueError(f"tensors were never added: {', '.join(missing[:5])}")
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._shard_of}
            self.write_json(INDEX_FILE, index)
        replaced = self._aside.with_name(self._aside.name + "-replaced")
        if self._output_dir.exists():
            self._output_dir.rename(replaced)
        self._aside.rename(self._output_dir)
        shutil.rmtree(replaced, ignore_errors=True)


def plan_shards(
    shapes: Mapping[str, Shape], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, list[str]]:
    """Which tensors go into which file, in the order given and filled up to the limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def check_output_is_free(output_dir: Path, *, force: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        UserError: `output_dir` is a file, or a directory that is not empty; with `force`, only if
            it is not a Hugging Face directory, which nobody meant to replace.
    """
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise UserError(f"{output_dir}: expected a directory to write to, found a file")
    if not any(output_dir.iterdir()):
        return
    if not force:
        raise UserError(f"{output_dir}: is not empty; choose another directory or use --force")
    if not (output_dir / "config.json").exists():
        raise UserError(
            f"{output_dir}: --force replaces Hugging Face directories only, and this one has no "
            "config.json"
        )
