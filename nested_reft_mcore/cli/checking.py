"""`nested-reft doctor` and `preflight` on the command line. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated

import typer

from nested_reft_mcore.cli.options import ConfigFile, Overrides


def preflight(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check every node and every link between processes, as `train` and `sft` do at their start.

    Versions, GPUs, room for two checkpoints, inputs that every node can read, a run directory that
    all can write and see, and each group's all-reduce and messages. Leaves with 3 and names node,
    rank and check where something is wrong.

    \b
    Examples:
      nested-reft preflight config.yaml
      srun --ntasks=16 nested-reft preflight config.yaml
    """
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.preflight import run_preflight

    leave(lambda: run_preflight(config, overrides or []))


def doctor(
    json_output: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of tables.")
    ] = False,
) -> None:
    """Say what is installed, what is missing and what is used instead.

    Leaves with 1 if something that is needed is missing.

    \b
    Examples:
      nested-reft doctor
      nested-reft doctor --json > machine.json
    """
    from nested_reft_mcore.launch.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=json_output))
