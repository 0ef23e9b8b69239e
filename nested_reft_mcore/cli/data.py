"""`nested-reft data`: look at data sets before a run depends on them, and make Math12k."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nested_reft_mcore.cli.options import Overrides

data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Check data sets as a run would read them, or make Math12k from the MATH files.

    \b
    Examples:
      nested-reft data check --config config.yaml
      nested-reft data check --train gsm8k=gsm8k/train.jsonl --eval gsm8k=gsm8k/test.jsonl
      nested-reft data math12k --train train.parquet --test test.parquet \\
          --math500 math500.parquet --output math12k.jsonl
    """,
)


@data_app.command()
def check(
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration of a run: its data.")
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A set to train on. May be repeated."),
    ] = None,
    eval: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A set to evaluate on. May be repeated."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Count tokens with it; without one, characters."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Leave with 1 for duplicates, overlap, empty answers too."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Say what data sets hold: rows, fields, lengths, what is broken, double or leaks.

    Rows are read as `train` reads them. A set is NAME=PATH, NAME:PRESET=PATH or PATH; PATH is a
    file or hub:OWNER/SET[:SUBSET][@SPLIT]. A NAME that is a preset's (gsm8k, svamp, mawps, math,
    math12k, aime24, amc23, math500, minerva, olympiadbench) reads that set's own files.
    Training prompts that are also evaluated on are listed, whatever their case and spacing.

    Leaves with 1 where `train` would refuse the data (data.broken_rows, data.overlong_prompts),
    with 2 where a set cannot be read, or has no usable row.

    \b
    Examples:
      nested-reft data check --config config.yaml data.max_prompt_length=512
      nested-reft data check --train math=math/train.parquet --eval math=math/test.parquet --strict
    """
    from nested_reft_mcore.cli.data_sets import run_check
    from nested_reft_mcore.cli.entry import leave

    leave(
        lambda: run_check(
            config, overrides or [], train or [], eval or [], tokenizer, strict, json_output
        )
    )


@data_app.command()
def math12k(
    train: Annotated[str, typer.Option(metavar="FILE", help="MATH's training file.")],
    test: Annotated[str, typer.Option(metavar="FILE", help="MATH's test file.")],
    math500: Annotated[str, typer.Option(metavar="FILE", help="MATH-500.")],
    output: Annotated[str, typer.Option(metavar="FILE", help="JSON lines to write.")],
) -> None:
    """Make Math12k: MATH's training and test questions, less those of MATH-500.

    \b
    Example:
      nested-reft data math12k --train math/train.parquet --test math/test.parquet \\
          --math500 bench/math500.test.parquet --output math12k.jsonl
    """
    from nested_reft_mcore.cli.data_sets import run_math12k
    from nested_reft_mcore.cli.entry import leave

    leave(lambda: run_math12k(train, test, math500, output))
