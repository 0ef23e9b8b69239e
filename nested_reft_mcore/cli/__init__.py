"""The command line: `nested-reft`, also `python -m nested_reft_mcore`.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from nested_reft_mcore.cli.atlas import atlas
from nested_reft_mcore.cli.bench import bench_app
from nested_reft_mcore.cli.checking import doctor, preflight
from nested_reft_mcore.cli.data import data_app
from nested_reft_mcore.cli.evaluate import evaluate
from nested_reft_mcore.cli.options import (
    Checkpoint,
    ConfigFile,
    DryGpus,
    DryHardware,
    DryNodes,
    DryRun,
    Dtype,
    Force,
    Hf,
    Overrides,
    PipelineParallel,
    StopStrings,
    StopTokens,
    Template,
    TensorParallel,
    TokenizerPath,
    Tolerance,
    Verify,
    WrittenDtype,
    fields,
)
from nested_reft_mcore.cli.plan import plan
from nested_reft_mcore.cli.probe import probe
from nested_reft_mcore.cli.report import report
from nested_reft_mcore.cli.simulate import simulate

app = typer.Typer(
    name="nested-reft",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Convert between Hugging Face directories and checkpoints, in either direction.

    \b
    Examples:
      nested-reft convert hf-to-mcore --hf models/base --output checkpoints/base
      nested-reft convert mcore-to-hf --checkpoint runs/first/checkpoints --output models/tuned
    """,
)
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.command()(atlas)
app.command()(doctor)
app.command()(evaluate)
app.command()(preflight)
app.command()(plan)
app.command()(probe)
app.command()(report)
app.command()(simulate)

SkipLayers = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Layers or parts not to run: 3,5.attention,7.mlp."),
]


def main() -> None:
    """Run the command line and leave with its exit code."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("nested_reft_mcore"))
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Nested-ReFT on Megatron-Core: reinforced fine-tuning with layer-skipped rollouts.

    The model in training writes its own rollouts with some of its layers skipped; the full model
    learns from them with an importance correction.

    \b
    A run from start to end:
      nested-reft doctor                        is everything there?
      nested-reft data check --config config.yaml   is the data as it should be?
      nested-reft preflight config.yaml         is every node fit?
      nested-reft plan config.yaml --nodes 2    does it fit?
      nested-reft simulate config.yaml --nodes 2   who waits for whom?
      nested-reft sft config.yaml               supervised warm-up
      nested-reft train config.yaml             reinforced fine-tuning
      nested-reft evaluate config.yaml          accuracy, full and nested
      nested-reft report runs/first             what happened, on one page
      nested-reft convert mcore-to-hf ...       take the model away

    \b
    Exit codes: 0 well; 1 a check failed or an internal error; 2 a mistake in what was given;
    3 a node is bad; 4 another process was lost; 75 stopped on request with everything saved: start
    again to go on.
    """


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    hf: Hf = None,
    checkpoint: Checkpoint = None,
    dry_run: DryRun = False,
    nodes: DryNodes = None,
    gpus_per_node: DryGpus = None,
    hardware: DryHardware = "h100",
) -> None:
    """Fine-tune with rewards: nested rollouts, importance correction, full-depth updates.

    Works alone, under torchrun, srun and mpirun. Started alone, it starts as many processes on this
    machine as the parallel sizes need. SIGUSR1 or SIGTERM: save, leave with 75; the same command
    goes on from there.

    \b
    Examples:
      nested-reft train config.yaml
      nested-reft train config.yaml nested.num_skipped=4 optimizer.lr=1e-6
      nested-reft train config.yaml --hf models/base run_dir=runs/second
      nested-reft train config.yaml --dry-run --nodes 2 --gpus-per-node 8
      srun --ntasks=16 nested-reft train config.yaml
    """
    from nested_reft_mcore.cli.entry import leave

    given = overrides or []
    if dry_run:
        from nested_reft_mcore.cli.dry_run import run_dry

        leave(lambda: run_dry(config, given, hf, checkpoint, nodes, gpus_per_node, hardware))
    from nested_reft_mcore.cli.runs import run_train, with_model

    leave(lambda: run_train(config, with_model(given, hf, checkpoint)))


@app.command()
def sft(
    config: ConfigFile, overrides: Overrides = None, hf: Hf = None, checkpoint: Checkpoint = None
) -> None:
    """Warm up on demonstrations, with layer dropout if wanted, before `train`.

    Reads the `sft` section; every line of data.train_path holds a demonstration. Layer
    dropout (sft.max_skipped) is what makes nested policies of small models usable.

    \b
    Examples:
      nested-reft sft config.yaml run_dir=runs/warm sft.num_steps=450
      nested-reft sft config.yaml sft.max_skipped=2
      nested-reft train config.yaml --checkpoint runs/warm/checkpoints
    """
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.runs import run_sft, with_model

    leave(lambda: run_sft(config, with_model(overrides or [], hf, checkpoint)))


@app.command()
def generate(
    prompts: Annotated[str, typer.Option(metavar="FILE", help="JSON lines, one prompt each.")],
    output: Annotated[str, typer.Option(metavar="FILE", help="JSON lines to write.")],
    hf: Hf = None,
    checkpoint: Checkpoint = None,
    tokenizer_path: TokenizerPath = None,
    skip_layers: SkipLayers = None,
    skip_ratio: Annotated[
        float | None, typer.Option(help="Skip this share of the layers, drawn from the seed.")
    ] = None,
    law: Annotated[
        str, typer.Option(metavar="uniform|stage_balanced", help="How --skip-ratio draws.")
    ] = "stage_balanced",
    border_layers: Annotated[
        int, typer.Option(help="Layers at either end that --skip-ratio keeps.")
    ] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep tokens of this mass.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 256,
    num_samples: Annotated[int, typer.Option(help="Completions of each prompt.")] = 1,
    stop_tokens: StopTokens = None,
    template: Template = "none",
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Write logprobs.")] = False,
    stop_strings: StopStrings = None,
    speculative: Annotated[
        bool,
        typer.Option(
            "--speculative", help="The skipped model drafts, the full one verifies: lossless."
        ),
    ] = False,
    max_slots: Annotated[
        int | None,
        typer.Option("--max-slots", "--slots", help="Sequences decoded at the same time."),
    ] = None,
    kv_cache_gb: Annotated[
        float | None, typer.Option(help="Memory for keys and values; default: half of the free.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Key of every random choice.")] = 0,
    dtype: Dtype = "float32",
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Complete the prompts of a file, with the full model or with layers skipped.

    A line in has `prompt`, `messages` or `prompt_token_ids`. A line out has `prompt_token_ids`,
    `token_ids`, `text`, `finish_reason` (stop, length or nan) and, with --logprobs, `logprobs`:
    logprobs[i] belongs to token_ids[i] under the distribution that was sampled from.

    \b
    Examples:
      nested-reft generate --hf models/tiny --prompts in.jsonl --output out.jsonl --greedy
      nested-reft generate --checkpoint runs/first/checkpoints --prompts in.jsonl \\
          --output out.jsonl --skip-layers 3,5.attention --logprobs --num-samples 4
    """
    values = fields(locals())
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.files import run_generate

    leave(lambda: run_generate(values))


@app.command()
def score(
    input: Annotated[str, typer.Option(metavar="FILE", help="JSON lines to score.")],
    output: Annotated[str, typer.Option(metavar="FILE", help="JSON lines to write.")],
    hf: Hf = None,
    checkpoint: Checkpoint = None,
    tokenizer_path: TokenizerPath = None,
    skip_layers: SkipLayers = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 8,
    dtype: Dtype = "float32",
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Give the log-probabilities of completions, at temperature 1.

    A line in has `prompt_token_ids` and `token_ids`, or the texts `prompt` and `text`; what
    `generate` writes will do. A line out has `logprobs`, one for each of `token_ids`.

    \b
    Examples:
      nested-reft score --hf models/tiny --input out.jsonl --output scores.jsonl
      nested-reft score --hf models/tiny --input out.jsonl --output nested.jsonl --skip-layers 3
    """
    values = fields(locals())
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.files import run_score

    leave(lambda: run_score(values))


@convert_app.command("hf-to-mcore")
def hf_to_mcore(
    hf: Annotated[str, typer.Option("--hf", metavar="DIR", help="Hugging Face directory.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint to write.")],
    dtype: WrittenDtype = "auto",
    verify: Verify = False,
    tolerance: Tolerance = 1e-3,
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Only warn of NaN and infinity in the weights."),
    ] = False,
    force: Force = False,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Turn a Hugging Face directory into a checkpoint that loads at any parallel layout.

    The layout given here is the one that the checkpoint's pieces are cut for and that --verify
    runs. More processes (torchrun, srun, mpirun) share the work.

    \b
    Examples:
      nested-reft convert hf-to-mcore --hf models/tiny --output checkpoints/tiny --verify
      mpirun -n 8 nested-reft convert hf-to-mcore --hf models/70b --output checkpoints/70b
    """
    values = fields(locals())
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.files import run_hf_to_mcore

    leave(lambda: run_hf_to_mcore(values))


@convert_app.command("mcore-to-hf")
def mcore_to_hf(
    checkpoint: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint to read.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="Hugging Face directory to write.")],
    tokenizer_path: TokenizerPath = None,
    dtype: WrittenDtype = "auto",
    max_shard_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Largest file, such as 500MB; a single tensor may exceed it."
        ),
    ] = "5GB",
    verify: Verify = False,
    tolerance: Tolerance = 1e-3,
    force: Force = False,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Turn a checkpoint into a Hugging Face directory that transformers loads.

    The layout given here is the one that --verify runs. More processes (torchrun, srun, mpirun)
    share the work, each with files of its own.

    \b
    Example:
      nested-reft convert mcore-to-hf --checkpoint runs/first/checkpoints --output models/mine
    """
    values = fields(locals())
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.files import run_mcore_to_hf

    leave(lambda: run_mcore_to_hf(values))


@app.command()
def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Checkpoint, directory of some, or Hugging Face.")
    ],
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Read every byte and compare its checksum.")
    ] = False,
    every_tensor: Annotated[
        bool, typer.Option("--all", help="Show the optimizer's tensors too.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
) -> None:
    """Say what a checkpoint holds: step, layout, parameters, tensors, state of its files.

    Leaves with 1 if a file is missing, changed or of another size than its manifest says.

    \b
    Examples:
      nested-reft inspect runs/first/checkpoints --checksums
      nested-reft inspect models/tiny --json
    """
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.files import run_inspect

    leave(lambda: run_inspect(directory, checksums, every_tensor, json_output))
