"""Options that several commands have. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; docs/configuration.md lists options.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.FIELD=VALUE", help="Options that replace the file's, read as YAML."
    ),
]
Hf = Annotated[str | None, typer.Option("--hf", metavar="DIR", help="Hugging Face directory.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="DIR", help="Checkpoint, or a directory of some.")
]
TokenizerPath = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="PATH", help="Tokenizer, if not the model's own."),
]
StopTokens = Annotated[
    list[str] | None,
    typer.Option("--stop-token", help="A token that ends a completion; may be repeated."),
]
StopStrings = Annotated[
    list[str] | None,
    typer.Option("--stop-string", help="A text that ends a completion; may be repeated."),
]
Template = Annotated[
    str, typer.Option(metavar="none|chat", help="chat: prompts go through the template.")
]
Dtype = Annotated[str, typer.Option(metavar="float32|bfloat16", help="Type of the weights.")]
TensorParallel = Annotated[int, typer.Option(help="Processes that share each layer.")]
PipelineParallel = Annotated[int, typer.Option(help="Stages that the layers are cut into.")]
WrittenDtype = Annotated[
    str, typer.Option(metavar="auto|float32|bfloat16", help="Type of the written weights.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare float32 logits of both models; 1 if they differ.")
]
Tolerance = Annotated[float, typer.Option(help="Largest difference that --verify accepts.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier output of the same kind.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check and say what would be started; start nothing.")
]
DryNodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="For --dry-run: machines; default 1.")
]
DryHardware = Annotated[
    str, typer.Option("--hardware", metavar="NAME|FILE", help="For --dry-run: as for `plan`.")
]
DryGpus = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node", min=1, help="For --dry-run: processes on each; default: as needed."
    ),
]


def fields(parameters: dict[str, Any]) -> dict[str, Any]:
    """A command's parameters, which are named as the fields of its options, as a plain section."""
    values = {
        name: [] if name in ("stop_tokens", "stop_strings") and v is None else v
        for name, v in parameters.items()
    }
    sizes = (values.pop("tensor_parallel"), values.pop("pipeline_parallel"))
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return values | {"parallel": dict(zip(names, sizes, strict=True))}


Nodes = Annotated[int, typer.Option(metavar="N", help="Machines.")]
GpusPerNode = Annotated[int, typer.Option(metavar="G", help="GPUs of each machine.")]
GpuMemory = Annotated[
    float | None,
    typer.Option(metavar="GB", help="Memory of a GPU in 10^9 bytes; default: the hardware's."),
]
Hardware = Annotated[
    str, typer.Option(metavar="a100-80|h100|h200|FILE.yaml", help="What the machines can do.")
]
Assume = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Replace an assumption; may be repeated."),
]
