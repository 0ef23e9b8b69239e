"""`train --dry-run`: what would be started, where, and whether it fits."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nested_reft_mcore.cli.runs import with_model
from nested_reft_mcore.config.layout import needed_processes
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.report import plan_report
from nested_reft_mcore.planning.run_plan import make_plan


def run_dry(
    path: Path,
    overrides: Sequence[str],
    hf: str | None,
    checkpoint: str | None,
    nodes: int | None,
    per_node: int | None,
    hardware: str,
) -> int:
    """Check a configuration against the processes there would be, and describe the run.

    Files that are missing are named and are no error. Where it is the directory of `hf` or
    `checkpoint` that is missing, the shape that the configuration itself has is planned with.

    Args:
        path: configuration file.
        overrides: options that replace the file's.
        hf: what `--hf` names.
        checkpoint: what `--checkpoint` names.
        nodes: machines; left out: one.
        per_node: processes on each machine; left out: what the parallel sizes need.
        hardware: profile of the machines that memory is planned for, as of `nested-reft plan`.

    Returns:
        0, also where the plan does not fit: it says so.

    Raises:
        UserError: the configuration is wrong, or the sizes do not fit.
    """
    whole = with_model(overrides, hf, checkpoint)
    weights = hf or checkpoint
    missing = [weights] if weights is not None and not Path(weights).exists() else []
    config = load_config(path, overrides if missing else whole)
    num_nodes = nodes or 1
    local_size = per_node or -(-needed_processes(config.parallel) // num_nodes)
    plan = make_plan(config, num_nodes, local_size, hardware=hardware)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    lines = [
        f"node {node + 1} of {num_nodes}: {_host(os.environ)}",
        f"command: {shlex.join(['nested-reft', 'train', str(path), *whole])}",
        f"run directory: {Path(config.run_dir).absolute()}",
        *_places(plan.layout, range(node * local_size, (node + 1) * local_size)),
        *plan_report(plan).splitlines(),
        *_missing(config, missing),
    ]
    # One write: other nodes print at the same time.
    print("\n".join(lines), flush=True)
    return 0


def _host(environ: Mapping[str, str]) -> str:
    """Slurm's name of this node, which is what its messages use; else the host's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def _places(layout: Layout, ranks: range) -> Iterator[str]:
    """Where the ranks of a node stand, in Megatron's default order."""
    yield "ranks here:"
    for rank in ranks:
        part = rank % layout.tensor
        replica = rank // layout.tensor % layout.data
        stage = rank // (layout.tensor * layout.data)
        yield f"  rank {rank}: tensor {part}, pipeline {stage}, data {replica}"


def _missing(config: Config, weights: Sequence[str]) -> Iterator[str]:
    """What the run would refuse to start without, if it started here."""
    paths = {
        "data.train_path": config.data.train_path,
        "data.eval_path": config.data.eval_path,
        "data.tokenizer_path": config.data.tokenizer_path,
    }
    found = [f"{key}={path}" for key, path in paths.items() if path and not Path(path).exists()]
    for name in (*weights, *found):
        yield f"missing: {name} (taken from {Path.cwd()})"
