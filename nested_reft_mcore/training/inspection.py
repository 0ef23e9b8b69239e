"""What a directory of weights is: `nested-reft inspect` and tools/inspect_checkpoint.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from nested_reft_mcore.checkpoints.manifest import read_manifest, verify
from nested_reft_mcore.config.checkpoint_layout import (
    read_checkpoint_architecture,
    resolve_checkpoint,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import CONFIG_FILE, load_config
from nested_reft_mcore.hf.config import read_architecture, read_json_object
from nested_reft_mcore.hf.families import weight_map
from nested_reft_mcore.hf.safetensors_reader import INDEX_FILE, SINGLE_FILE, SafetensorsReader
from nested_reft_mcore.mcore.piece_reader import PieceReader
from nested_reft_mcore.observability.environment import ENVIRONMENT_FILE

_OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor."""

    name: str
    shape: list[int]
    dtype: str
    num_pieces: int


@dataclass(frozen=True)
class Inspection:
    """What there is to say about a directory."""

    directory: str
    format: str
    config: dict[str, Any]
    """Fields of `ModelArchitecture`."""
    num_parameters: int
    """Of the model, padding and tied copies not counted."""
    tensors: list[TensorInfo]
    checksums: str
    """What is known of the files."""
    step: int | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    """How the run was spread over processes that saved it, as far as the checkpoint tells."""
    num_bytes: int | None = None
    """Of all files of the manifest."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the files."""


def inspect(path: Path, *, checksums: bool) -> Inspection:
    """Look at a checkpoint, the newest one of a root, or a Hugging Face directory.

    Args:
        path: The directory.
        checksums: Read every byte of a checkpoint; else sizes alone are compared.

    Raises:
        UserError: it is none of these, or its index is broken.
    """
    if (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return _inspect_hf(path)
    return _inspect_checkpoint(resolve_checkpoint(path), checksums=checksums)


def print_inspection(found: Inspection, *, every_tensor: bool, as_json: bool) -> None:
    """Print it, as tables or as one JSON object."""
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    console = Console(highlight=False)
    table = Table(Column("tensor", overflow="fold"), "shape", "type", "pieces")
    shown = [t for t in found.tensors if every_tensor or not t.name.startswith(_OPTIMIZER)]
    for tensor in shown:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, shape, tensor.dtype, str(tensor.num_pieces))
    console.print(table)
    hidden = len(found.tensors) - len(shown)
    if hidden:
        console.print(f"and {hidden} tensors of the optimizer: --all shows them")
    # Last, where it is still on the screen.
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    for problem in found.problems:
        console.print(f"[red]broken[/red]: {problem}")


def _facts(found: Inspection) -> Iterable[tuple[str, str]]:
    yield "directory", found.directory
    yield "format", found.format
    if found.step is not None:
        yield "step", str(found.step)
    if found.layout:
        yield "saved by", ", ".join(f"{key}={value}" for key, value in found.layout.items())
    yield "parameters", f"{found.num_parameters:,}"
    if found.num_bytes is not None:
        yield "bytes", f"{found.num_bytes:,}"
    yield "config", ", ".join(f"{key}={value}" for key, value in found.config.items())
    yield "checksums", found.checksums


def _inspect_checkpoint(directory: Path, *, checksums: bool) -> Inspection:
    architecture = read_checkpoint_architecture(directory)
    problems = verify(directory, "checksums" if checksums else "sizes")
    with PieceReader(directory) as reader:
        tensors = [
            TensorInfo(key, list(shape), _name(reader.dtypes[key]), reader.num_pieces[key])
            for key, shape in reader.shapes.items()
        ]
    try:
        manifest = read_manifest(directory)
        step, num_bytes = manifest.step, manifest.num_bytes
    except UserError:
        step, num_bytes = None, None
    state = "broken" if problems else "read and right" if checksums else "sizes right, not read"
    if not problems and not checksums:
        state += "; --checksums reads them"
    return Inspection(
        directory=str(directory),
        format="Megatron distributed checkpoint (torch_dist)",
        config=architecture.model_dump(exclude_none=True),
        num_parameters=_count(weight_map(architecture).hf_shapes.values()),
        tensors=sorted(tensors, key=lambda tensor: _in_order(tensor.name)),
        checksums=state,
        step=step,
        layout=_layout(directory),
        num_bytes=num_bytes,
        problems=problems,
    )


def _layout(directory: Path) -> dict[str, Any]:
    """Parallel sizes and processes of the run that saved it; nothing for a conversion."""
    if not (directory / CONFIG_FILE).is_file():
        return {}
    parallel = load_config(directory / CONFIG_FILE, []).parallel
    layout = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual_pipeline": parallel.virtual_pipeline_model_parallel_size,
        "processes": read_json_object(directory / ENVIRONMENT_FILE).get("world_size"),
    }
    return {name: size for name, size in layout.items() if size is not None}


def _inspect_hf(directory: Path) -> Inspection:
    architecture = read_architecture(directory)
    with SafetensorsReader(directory) as reader:
        names = sorted(reader.names, key=_in_order)
        tensors = [TensorInfo(n, list(reader.shape(n)), _name(reader.dtype(n)), 1) for n in names]
    return Inspection(
        directory=str(directory),
        format="Hugging Face safetensors",
        config=architecture.model_dump(exclude_none=True),
        num_parameters=_count(tensor.shape for tensor in tensors),
        tensors=tensors,
        checksums="this format has none",
        num_bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
    )


def _in_order(name: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _count(shapes: Iterable[Iterable[int]]) -> int:
    return sum(prod(shape) for shape in shapes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
