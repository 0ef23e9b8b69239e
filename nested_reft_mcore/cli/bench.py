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
    help="""Measure how fast this machine generates.

    \b
    Example:
      nested-reft bench rollout --hf models/base --output rollout.json
    """,
)


@bench_app.callback()
def _describe_bench() -> None:
    # Without a callback the only command of a group would be the group itself.
    pass


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
