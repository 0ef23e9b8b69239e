"""The commands that a configuration file describes: train, sft and evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nested_reft_mcore.cli.entry import Job, run_job
from nested_reft_mcore.cli.files import check_skip_layers
from nested_reft_mcore.cli.preflight import needs_of
from nested_reft_mcore.config.checkpoint_layout import LATEST_FILE
from nested_reft_mcore.config.checks import (
    check_architecture,
    check_batches,
    check_depth,
    check_for_evaluation,
    check_for_training,
    check_for_warm_up,
    check_paths,
    check_warm_up_batches,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.probe_record import read_sensitivity
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.hf.config import model_architecture, model_source
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.signals import StopSignals

Work = Callable[[Config, ParallelContext, StopSignals], int]
"""What a command does on every process; returns the exit code."""


def run_train(path: Path, overrides: Sequence[str]) -> int:
    """Reinforced fine-tuning; returns the exit code. Raises UserError."""

    def work(config: Config, context: ParallelContext, stop: StopSignals) -> int:
        from nested_reft_mcore.training.trainer import train

        return train(config, context, stop)

    return _run(path, overrides, work, check_for_training, check_batches)


def run_sft(path: Path, overrides: Sequence[str]) -> int:
    """Supervised warm-up; returns the exit code. Raises UserError."""

    def work(config: Config, context: ParallelContext, stop: StopSignals) -> int:
        from nested_reft_mcore.training.warmup import warm_up

        return warm_up(config, context, stop)

    return _run(path, overrides, work, check_for_warm_up, check_warm_up_batches)


def run_evaluate(
    path: Path | None,
    overrides: Sequence[str],
    hf: str | None,
    checkpoint: str | None,
    output: Path | None,
    *,
    restart: bool = False,
) -> int:
    """Evaluation; returns the exit code. Raises UserError.

    Without a model on the command line, a configuration whose model has fresh weights stands for
    what its own run has saved. `path` may be absent if the overrides say all that is needed.
    """
    overrides = with_model(overrides, hf, checkpoint)
    config = load_config(path, overrides)
    if config.model.architecture is not None:
        checkpoints = Path(config.run_dir) / "checkpoints"
        if not (checkpoints / LATEST_FILE).is_file():
            raise UserError(
                f"{path}: its model has fresh weights and {checkpoints} holds no checkpoint; "
                "say what to evaluate with --checkpoint DIR or --hf DIR"
            )
        overrides = with_model(overrides, checkpoint=str(checkpoints))

    def work(config: Config, context: ParallelContext, stop: StopSignals) -> int:
        from nested_reft_mcore.training.evaluation_run import run_evaluation

        return run_evaluation(config, context, output, restart=restart)

    return _run(path, overrides, work, check_for_evaluation)


def _run(
    path: Path | None,
    overrides: Sequence[str],
    work: Work,
    check: Callable[[Config], None],
    check_batches: Callable[[Config, int], None] | None = None,
) -> int:
    """Read and check the configuration, then do `work`; with batches to split, it heeds signals."""
    trains = check_batches is not None

    def make() -> Job:
        config = load_config(path, overrides)
        check_paths(config, trains=trains)
        architecture = model_architecture(config.model)
        check_architecture(architecture, model_source(config.model))
        check_depth(config, architecture.num_layers)
        if trains and config.nested.law == "sensitivity":
            read_sensitivity(config.nested, architecture)
        check(config)
        for text in config.evaluation.skip_layers:
            check_skip_layers(text, architecture)
        return Job(
            parallel=config.parallel,
            architecture=architecture,
            work=partial(work, config),
            check_batches=partial(check_batches, config) if check_batches else None,
            seed=config.seed,
            log_dir=_log_dir(config),
            log_level=config.logging.level,
            stoppable=trains,
            launch=config.launch,
            needs=needs_of(config, architecture) if trains else None,
            preflight=config.launch.preflight,
        )

    return run_job(make)


def with_model(
    overrides: Sequence[str], hf: str | None = None, checkpoint: str | None = None
) -> list[str]:
    """The overrides, and those that `--hf` or `--checkpoint` stand for.

    Raises:
        UserError: both are given.
    """
    if hf is None and checkpoint is None:
        return list(overrides)
    if hf is not None and checkpoint is not None:
        raise UserError("--hf and --checkpoint are both set; set one of them")
    origins = {"hf_path": hf, "checkpoint": checkpoint, "architecture": None}
    return [*overrides, *(f"model.{key}={json.dumps(value)}" for key, value in origins.items())]


def _log_dir(config: Config) -> Path:
    """A directory for the output of this start's processes, beside those of earlier starts."""
    return Path(config.run_dir) / "logs" / time.strftime("%Y%m%d-%H%M%S")
