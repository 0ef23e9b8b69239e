"""`train --dry-run`: what would be started, where, and whether it fits. Imports no torch."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checks import (
    check_architecture,
    check_batches,
    check_depth,
    check_for_training,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.layout import check_layout, needed_processes
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.hf.config import model_architecture, model_source


def run_dry(path: Path, overrides: Sequence[str], nodes: int | None, per_node: int | None) -> int:
    """Check a configuration against the processes there would be, and describe the run.

    Files that are missing are named and are no error: they may be elsewhere on this machine.

    Args:
        path: configuration file.
        overrides: options that replace the file's.
        nodes: machines; left out: one.
        per_node: processes on each machine; left out: what the parallel sizes need.

    Returns:
        0.

    Raises:
        UserError: the configuration is wrong, or the sizes do not fit.
    """
    config = load_config(path, overrides)
    check_for_training(config)
    needed = needed_processes(config.parallel)
    num_nodes = nodes or 1
    local_size = per_node or -(-needed // num_nodes)
    architecture = _architecture(config)
    replicas = _replicas(config, architecture, num_nodes * local_size)
    check_batches(config, replicas)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    lines = [
        f"node {node + 1} of {num_nodes}: {_host(os.environ)}",
        f"command: {shlex.join(['nested-reft', 'train', str(path), *overrides])}",
        f"run directory: {Path(config.run_dir).absolute()}",
        *_layout(config, replicas, range(node * local_size, (node + 1) * local_size)),
        *_memory(config, architecture, num_nodes, local_size),
        *_missing(config),
    ]
    # One write: other nodes print at the same time.
    print("\n".join(lines), flush=True)
    return 0


def _architecture(config: Config) -> ModelArchitecture | None:
    """The model's shape; None if the directory that would tell is not here."""
    source = model_source(config.model)
    if config.model.architecture is None and not Path(source).exists():
        return None
    architecture = model_architecture(config.model)
    check_architecture(architecture, source)
    check_depth(config, architecture.num_layers)
    return architecture


def _replicas(config: Config, architecture: ModelArchitecture | None, world_size: int) -> int:
    """The data-parallel size; without a shape, whether heads and layers can be cut stays open."""
    if architecture is not None:
        return check_layout(architecture, config.parallel, world_size)
    sizes = config.parallel
    replica = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
    if world_size % replica or sizes.data_parallel_size not in (None, world_size // replica):
        raise UserError(
            f"parallel: the sizes need {needed_processes(sizes)} processes or, without "
            f"data_parallel_size, a multiple of {replica}, but there are {world_size}"
        )
    return world_size // replica


def _host(environ: Mapping[str, str]) -> str:
    """Slurm's name of this node, which is what its messages use; else the host's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def _layout(config: Config, replicas: int, ranks: range) -> Iterator[str]:
    """The sizes, and where the ranks of this node stand in Megatron's default order."""
    tensor = config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = f", {virtual} chunks a stage" if virtual else ""
    yield (
        f"layout: {tensor * pipeline * replicas} processes = {tensor} tensor x "
        f"{pipeline} pipeline x {replicas} data{chunks}"
    )
    for rank in ranks:
        part = rank % tensor
        replica = rank // tensor % replicas
        stage = rank // (tensor * replicas)
        yield f"  rank {rank}: tensor {part}, pipeline {stage}, data {replica}"


def _memory(
    config: Config, architecture: ModelArchitecture | None, nodes: int, per_node: int
) -> Iterator[str]:
    """The memory plan, as far as the model's shape is known."""
    if architecture is None:
        yield f"memory plan: unknown, {model_source(config.model)} is not here"


def _missing(config: Config) -> Iterator[str]:
    """What the run would refuse to start without, if it started here."""
    paths = {
        "model.hf_path": config.model.hf_path,
        "model.checkpoint": config.model.checkpoint,
        "data.train_path": config.data.train_path,
        "data.eval_path": config.data.eval_path,
        "data.tokenizer_path": config.data.tokenizer_path,
    }
    for key, path in paths.items():
        if path is not None and not Path(path).exists():
            yield f"missing: {key}={path} (taken from {Path.cwd()})"
