"""`nested-reft bench`. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from nested_reft_mcore.cli.options import (
    Checkpoint,
    Dtype,
    Hf,
    PipelineParallel,
    TensorParallel,
    fields,
)

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Measure how fast this machine generates, and what it can do at best.

    \b
    Examples:
      nested-reft bench rollout --hf models/base --output rollout.json
      nested-reft bench hardware --output mine.yaml
    """,
)


@bench_app.command("rollout")
def bench_rollout(
    hf: Hf = None,
    checkpoint: Checkpoint = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES", help="Random weights: hidden=,layers=,heads=,groups=,ffn=,vocab=."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write every run here as JSON.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Sequences generated together.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each prompt.")] = 64,
    skip: Annotated[
        str, typer.Option(metavar="LIST", help="Percentages of the layers to skip.")
    ] = "0,5,10,15,20,25,50",
    parts: Annotated[
        str, typer.Option(metavar="LIST", help="What to skip of them, one after the other.")
    ] = "layer,attention,mlp",
    contexts: Annotated[
        str | None,
        typer.Option(
            metavar="LIST|none",
            help="Lengths at which decoding alone is measured; 128,1024,4096 if left out.",
        ),
    ] = None,
    context_sequences: Annotated[int, typer.Option(help="Sequences at these lengths.")] = 4,
    context_new_tokens: Annotated[int, typer.Option(help="Tokens decoded at these lengths.")] = 24,
    law: Annotated[
        str, typer.Option(metavar="uniform|stage_balanced", help="How layers are drawn.")
    ] = "stage_balanced",
    border_layers: Annotated[int, typer.Option(help="Layers at either end that are kept.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 5,
    peers: Annotated[
        str, typer.Option(metavar="LIST", help="Others to measure: transformers,vllm.")
    ] = "",
    vllm_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Python of an environment with vLLM.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Key of every random choice.")] = 0,
    dtype: Dtype = "float32",
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Measure generation: by share of layers skipped, against the ceiling, and against others.

    Random prompts, a fixed number of sampled tokens, nothing stops earlier. Cases take turns in
    rounds; medians are reported, and the JSON has every run with the machine and the commit. The
    ceiling is what skipping would gain if it saved its share of the work that skipping everything
    saves; docs/performance.md says how to read it. OMP_NUM_THREADS sets the threads of a process.

    \b
    Examples:
      nested-reft bench rollout --shape hidden=256,layers=12,heads=8,groups=2,ffn=704,vocab=8192
      nested-reft bench rollout --hf models/base --peers transformers --output rollout.json
      nested-reft bench rollout --hf models/base --skip 10,50 --parts layer --contexts none
      nested-reft bench rollout --hf models/base --peers vllm --vllm-python envs/vllm/bin/python
      nested-reft bench rollout --hf models/base --pipeline-parallel 2
    """
    values = fields(locals())
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.measuring import run_bench_rollout

    leave(lambda: run_bench_rollout(values))


@bench_app.command("hardware")
def bench_hardware(
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE.yaml", help="Write the profile that --hardware reads."),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes; default: one a GPU, or two without GPUs."),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write every number here.")
    ] = None,
    dtypes: Annotated[
        str, typer.Option(metavar="auto|LIST", help="float32, bfloat16; auto: both on a GPU.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(metavar="N", help="Medians are over these.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that it works, measures little.")
    ] = False,
) -> None:
    """Measure matrix products, memory and links, and write a profile of this machine.

    Products: a large square one, those of decoding (1 to 128 rows, by the kernels that decoding
    uses here) and those of an update. Memory: a matrix times a vector, a copy. Then the same by all
    processes of a node at once, and all-reduces and messages between them by size, gloo or NCCL.
    Run it with as many processes a node as training will have, on nothing else; under srun or
    torchrun on two nodes it measures the network too. What it cannot measure stays at a built-in
    value, and the profile says so. docs/planning.md tells how plans use it.

    The CUDA side has not been run on a GPU yet.

    \b
    Examples:
      nested-reft bench hardware --output mine.yaml
      nested-reft plan config.yaml --hardware mine.yaml
      srun --nodes 2 --ntasks-per-node 8 nested-reft bench hardware --output mine.yaml
    """
    values = {
        "output": output,
        "nproc": nproc,
        "json_file": json_file,
        "dtypes": dtypes,
        "rounds": rounds,
        "quick": quick,
    }
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.measuring import run_bench_hardware

    leave(lambda: run_bench_hardware(values))
