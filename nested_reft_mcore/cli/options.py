"""Options that several commands have. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Hf = Annotated[str | None, typer.Option("--hf", metavar="DIR", help="Hugging Face directory.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="DIR", help="Checkpoint, or a directory of some.")
]
Dtype = Annotated[str, typer.Option(metavar="float32|bfloat16", help="Type of the weights.")]
TensorParallel = Annotated[int, typer.Option(help="Processes that share each layer.")]
PipelineParallel = Annotated[int, typer.Option(help="Stages that the layers are cut into.")]


def fields(parameters: dict[str, Any]) -> dict[str, Any]:
    """A command's parameters, which are named as the fields of its options, as a plain section."""
    values = {
        name: [] if name in ("stop_tokens", "stop_strings") and v is None else v
        for name, v in parameters.items()
    }
    sizes = (values.pop("tensor_parallel"), values.pop("pipeline_parallel"))
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return values | {"parallel": dict(zip(names, sizes, strict=True))}
