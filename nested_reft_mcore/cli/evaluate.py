"""The command `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nested_reft_mcore.cli.options import Checkpoint, Hf, Overrides

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=FILE",
        help="A set to evaluate on, instead of the file's; may be repeated. docs/data.md has the "
        "names that are known.",
    ),
]
SkipLayers = Annotated[
    list[str] | None,
    typer.Option(
        "--skip-layers",
        metavar="LIST",
        help="Also evaluate without these, 3,5.attention,7.mlp; may be repeated.",
    ),
]


def evaluate(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]", help="YAML file; without one say --data, and --hf or --checkpoint."
        ),
    ] = None,
    overrides: Overrides = None,
    data: Data = None,
    hf: Hf = None,
    checkpoint: Checkpoint = None,
    skip_layers: SkipLayers = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Sampled completions of each prompt, beside the greedy one.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Prompts of each set, evenly spread; default: all.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest completion.")] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="none|chat", help="chat: questions go through the chat template."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures here as JSON.")
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away what an earlier evaluation has left there."),
    ] = False,
) -> None:
    """Judge a model on held-out prompts: greedy, sampled, with layers skipped.

    Prints for each set, and each level or subject where it has them, greedy accuracy, avg@n, pass@k
    and maj@n with 95% intervals, response lengths and the share that was cut off. The same goes to
    JSON, and every completion to JSON lines, by default in <run_dir>/evaluate. A killed evaluation
    goes on where it was. docs/evaluation.md says what the figures mean.

    Without --checkpoint and --hf it is the configuration's model, or what its run has saved last if
    that model starts from fresh weights. Without CONFIG rewards are by math_verify, and results go
    to runs/<model>/evaluate; any option of docs/configuration.md may follow as SECTION.FIELD=VALUE.

    \b
    Examples:
      nested-reft evaluate config.yaml --checkpoint runs/first/checkpoints
      nested-reft evaluate --hf models/base --template chat --data gsm8k=gsm8k/test.jsonl \\
          --data math500=math500.parquet --num-samples 8 --max-new-tokens 1024
      nested-reft evaluate config.yaml --skip-layers 3,5,7 --skip-layers 4.attention,6.attention
    """
    from nested_reft_mcore.cli.entry import leave

    def command() -> int:
        from nested_reft_mcore.cli.runs import run_evaluate

        path, given = config, list(overrides or [])
        if path is not None and "=" in str(path) and not path.exists():
            path, given = None, [str(path), *given]
        numbers = {
            "evaluation.num_samples": num_samples,
            "evaluation.num_prompts": num_prompts,
            "rollout.max_new_tokens": max_new_tokens,
            "data.template": template,
        }
        before = [] if path is not None else without_config(hf, checkpoint)
        if any(option.startswith("reward") for option in given):
            before = [option for option in before if not option.startswith("reward")]
        options = [
            *before,
            *given,
            *(f"{key}={json.dumps(value)}" for key, value in numbers.items() if value is not None),
            *data_overrides(data or []),
        ]
        if skip_layers:
            options.append(f"evaluation.skip_layers={json.dumps(skip_layers)}")
        return run_evaluate(path, options, hf, checkpoint, output, restart=restart)

    leave(command)


def without_config(hf: str | None, checkpoint: str | None) -> list[str]:
    """What stands for a configuration file: a directory for the results, and the reward.

    Raises:
        UserError: no model is named.
    """
    from nested_reft_mcore.config.errors import UserError

    model = hf or checkpoint
    if model is None:
        raise UserError(
            "no model: expected --hf DIR, --checkpoint DIR or a configuration file that names one"
        )
    path = Path(model)
    named = path.parent if path.name == "checkpoints" else path
    run_dir = Path("runs") / (named.name or "model")
    return [f"run_dir={json.dumps(str(run_dir))}", "reward.name=math_verify"]


def data_overrides(given: Sequence[str]) -> list[str]:
    """`--data NAME=FILE` as overrides of the section `data`. UserError if one cannot be read."""
    if not given:
        return []
    from nested_reft_mcore.config.data import parse_source

    sources = [parse_source(text).model_dump(mode="json", exclude_defaults=True) for text in given]
    return ["data.eval_path=null", f"data.eval={json.dumps(sources)}"]
