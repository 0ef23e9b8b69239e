"""Whether a model fits a parallel layout, and what would fit where it does not."""

from __future__ import annotations

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ParallelConfig

_TENSOR = "parallel.tensor_model_parallel_size"
_PIPELINE = "parallel.pipeline_model_parallel_size"
_VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
_DATA = "parallel.data_parallel_size"


def check_layout(architecture: ModelArchitecture, parallel: ParallelConfig, world_size: int) -> int:
    """Check the model and the number of processes against the parallel sizes.

    Args:
        architecture: Shape of the model.
        parallel: Sizes asked for.
        world_size: Number of processes, as launched.

    Returns:
        The data-parallel size.

    Raises:
        UserError: says which number does not fit, and which would.
    """
    check_model_fits(architecture, parallel)
    tensor = parallel.tensor_model_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    replica = tensor * pipeline
    data = parallel.data_parallel_size
    if data is not None and replica * data != world_size:
        raise UserError(
            f"{_TENSOR}={tensor} * {_PIPELINE}={pipeline} * {_DATA}={data} = {replica * data}, "
            f"but there are {world_size} processes; start {replica * data} processes"
            + (f", or set {_DATA}={world_size // replica}" if world_size % replica == 0 else "")
        )
    if world_size % replica:
        fitting = [
            f"{t} x {p}"
            for t in _tensor_sizes(architecture)
            for p in _pipeline_sizes(architecture, parallel.virtual_pipeline_model_parallel_size)
            if world_size % (t * p) == 0
        ]
        below = world_size // replica * replica
        counts = " or ".join(str(n) for n in (below, below + replica) if n)
        raise UserError(
            f"{_TENSOR}={tensor} * {_PIPELINE}={pipeline} = {replica} does not divide the "
            f"{world_size} processes; what would fit: {counts} processes, or for {world_size} "
            f"processes tensor x pipeline {', '.join(fitting)}"
        )
    return world_size // replica


def check_model_fits(architecture: ModelArchitecture, parallel: ParallelConfig) -> None:
    """Check that heads, KV groups, MLP and layers can be cut as asked.

    Raises:
        UserError: says which number does not fit, and which would.
    """
    tensor = parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(architecture, name)
        if size % tensor:
            raise UserError(
                f"{_TENSOR}={tensor} does not divide the model's {name}={size}; "
                f"what would fit: {', '.join(map(str, _tensor_sizes(architecture)))}"
            )
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    layers = architecture.num_layers
    if layers % pipeline:
        fitting = ", ".join(map(str, _pipeline_sizes(architecture, None)))
        raise UserError(
            f"{_PIPELINE}={pipeline} does not divide the model's num_layers={layers}; "
            f"what would fit: {fitting}"
        )
    if virtual is not None and pipeline == 1:
        raise UserError(f"{_VIRTUAL}={virtual} needs {_PIPELINE} above 1")
    if virtual is not None and layers % (pipeline * virtual):
        per_stage = layers // pipeline
        fitting = [str(n) for n in range(2, per_stage + 1) if per_stage % n == 0]
        raise UserError(
            f"{_VIRTUAL}={virtual} does not divide the {per_stage} layers of a stage "
            f"(num_layers={layers} / {_PIPELINE}={pipeline}); "
            f"what would fit: {', '.join(fitting) or 'none, leave it out'}"
        )


def stage_of_layer(num_layers: int, pipeline_size: int, num_chunks: int) -> tuple[int, ...]:
    """The pipeline rank of each global layer; chunk v of rank p follows chunk v of rank p - 1."""
    per_chunk = num_layers // (pipeline_size * num_chunks)
    return tuple((layer // per_chunk) % pipeline_size for layer in range(num_layers))


def needed_processes(parallel: ParallelConfig) -> int:
    """How many processes a bare start has to make."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * (parallel.data_parallel_size or 1)
    )


def _tensor_sizes(architecture: ModelArchitecture) -> list[int]:
    """Every tensor-parallel size that divides heads, KV groups and MLP."""
    sizes = (
        architecture.num_attention_heads,
        architecture.num_query_groups,
        architecture.ffn_hidden_size,
    )
    return [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]


def _pipeline_sizes(architecture: ModelArchitecture, virtual: int | None) -> list[int]:
    """Every number of stages that divides the layers, with `virtual` chunks each."""
    chunks = virtual or 1
    first = 1 if virtual is None else 2
    layers = architecture.num_layers
    return [n for n in range(first, layers + 1) if layers % (n * chunks) == 0]
