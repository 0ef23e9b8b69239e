"""`nested-reft plan`. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nested_reft_mcore.cli.options import (
    Assume,
    Checkpoint,
    ConfigFile,
    GpuMemory,
    GpusPerNode,
    Hardware,
    Hf,
    Nodes,
    Overrides,
)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    gpu_memory: GpuMemory = None,
    hardware: Hardware = "h100",
    assume: Assume = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the plan here as JSON.")
    ] = None,
    hf: Hf = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Say what a run of `train` needs of each GPU, whether that fits, and how long a step takes.

    Starts nothing and loads no weights: the shape of the model comes from the configuration, or
    from the config.json of its Hugging Face directory. Memory is that of the worst rank and of the
    longest sequences that the options allow; what would help is found by planning again with the
    change. Times come from a stated profile of the machines and stated efficiencies: they rank
    layouts, and measured numbers make them better. docs/planning.md says what is counted.

    Leaves with 0 if it fits, 1 if not, 2 for a mistake.

    \b
    Examples:
      nested-reft plan examples/qwen2.5_math_7b/config.yaml --nodes 1 --gpus-per-node 8
      nested-reft plan config.yaml parallel.tensor_model_parallel_size=4 --nodes 2 \\
          --hardware a100-80
      nested-reft plan config.yaml --hardware mine.yaml --assume response_fill=0.7
    """
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.runs import with_model

    leave(
        lambda: run_plan(
            config,
            with_model(overrides or [], hf, checkpoint),
            nodes,
            gpus_per_node,
            gpu_memory,
            hardware,
            assume or [],
            json_file,
        )
    )


def run_plan(
    path: Path,
    overrides: Sequence[str],
    nodes: int,
    gpus_per_node: int,
    gpu_memory_gb: float | None,
    hardware: str,
    assumptions: Sequence[str],
    json_file: Path | None,
) -> int:
    """Print the plan; 0 if it fits, 1 if not. Raises UserError."""
    import json

    from nested_reft_mcore.config.errors import UserError, reason_of
    from nested_reft_mcore.config.load import load_config
    from nested_reft_mcore.planning.hardware import load_hardware
    from nested_reft_mcore.planning.report import plan_record, plan_report
    from nested_reft_mcore.planning.run_plan import make_plan

    config = load_config(path, overrides)
    profile = load_hardware(hardware, assumptions)
    made = make_plan(config, nodes, gpus_per_node, gpu_memory_gb, profile)
    print(plan_report(made), flush=True)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(plan_record(made), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file}: cannot be written: {reason_of(error)}") from None
    return 0 if made.fits else 1
