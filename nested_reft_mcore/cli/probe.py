"""`nested-reft probe`. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from nested_reft_mcore.cli.options import (
    Checkpoint,
    Dtype,
    Hf,
    PipelineParallel,
    StopStrings,
    StopTokens,
    Template,
    TensorParallel,
    TokenizerPath,
    fields,
)


def probe(
    prompts: Annotated[str, typer.Option(metavar="FILE", help="JSON lines, one prompt each.")],
    output: Annotated[
        str, typer.Option(metavar="FILE", help="JSON to write, for nested.sensitivity_path.")
    ],
    hf: Hf = None,
    checkpoint: Checkpoint = None,
    tokenizer_path: TokenizerPath = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="PNG to write; default: beside the JSON.")
    ] = None,
    kl_budget: Annotated[
        float, typer.Option(help="Nats per token that the recommendation may cost.")
    ] = 0.1,
    compare: Annotated[
        str, typer.Option(metavar="LIST", help="Budgets to compare the laws at: 0.05,0.1.")
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Use the first so many prompts.")] = None,
    num_samples: Annotated[int, typer.Option(help="Sampled answers to each prompt.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of the training to come.")] = 1.0,
    stop_tokens: StopTokens = None,
    stop_strings: StopStrings = None,
    template: Template = "none",
    context_length: Annotated[
        int | None, typer.Option(help="Positions attended to where time is measured; 1024.")
    ] = None,
    decode_sequences: Annotated[
        int, typer.Option(help="Sequences decoded together where time is measured.")
    ] = 16,
    repeats: Annotated[int, typer.Option(help="Timed rounds; medians count.")] = 7,
    random_layers: Annotated[
        str, typer.Option(metavar="LIST", help="Numbers of random layers to skip together.")
    ] = "1,2,4",
    draws: Annotated[int, typer.Option(help="Plans for each of these numbers and parts.")] = 3,
    calibration: Annotated[
        int, typer.Option(help="Plans that the prediction of KL is fitted to.")
    ] = 12,
    held_out: Annotated[int, typer.Option(help="Plans that test the prediction.")] = 6,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Key of every random choice.")] = 0,
    dtype: Dtype = "float32",
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Find out what skipping each layer costs and saves, and what to skip for a budget of KL.

    The full model answers the prompts. Then each whole layer, each attention and each MLP is
    skipped alone, and the exact KL(nested || full) over the vocabulary is taken at every token of
    the answers: how far rollouts of that nested policy are from on-policy. Engines of another
    precision differ by about 0.01 nats per token; at 1 an importance weight says little.

    Prints a table with standard errors, writes JSON and a plot, and recommends border layers,
    protected layers and a number to skip for `uniform` and `stage_balanced`, and what the law
    `sensitivity` makes of the same budget. Its prediction for several parts together is fitted to
    some plans and tested on others. docs/sensitivity.md says how to read it.

    The time is about that of (3 * layers + 40) forward passes over the answers; use a few dozen
    answers of the task, at the temperature of the training.

    \b
    Examples:
      nested-reft probe --hf models/base --prompts task.jsonl --output probe.json --limit 16
      nested-reft probe --checkpoint runs/warm/checkpoints --prompts task.jsonl \\
          --output probe.json --kl-budget 0.05 --compare 0.05,0.1
      nested-reft train config.yaml nested.law=sensitivity \\
          nested.sensitivity_path=probe.json nested.kl_budget=0.05
    """
    values = fields(locals())
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.probing import run_probe

    leave(lambda: run_probe(values))
