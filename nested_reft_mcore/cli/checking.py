"""`nested-reft preflight` on the command line. Nothing heavy is imported here."""

from __future__ import annotations

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
