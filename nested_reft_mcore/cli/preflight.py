"""`nested-reft preflight`, and what a run asks of every node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.checkpoints.root import list_checkpoints
from nested_reft_mcore.cli.entry import Job, run_job
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checks import check_architecture, check_depth, check_paths
from nested_reft_mcore.config.data import data_paths
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.schema import Config, ModelConfig
from nested_reft_mcore.hf.config import model_architecture, model_source
from nested_reft_mcore.hf.families import weight_map
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.preflight import Needs
from nested_reft_mcore.launch.signals import StopSignals


def run_preflight(path: Path, overrides: Sequence[str]) -> int:
    """Check every node and link, and nothing else; returns the exit code. Raises UserError."""

    def nothing(_context: ParallelContext, _stop: StopSignals) -> int:
        return ExitCode.OK

    def make() -> Job:
        config = load_config(path, overrides)
        check_paths(config)
        architecture = model_architecture(config.model)
        check_architecture(architecture, model_source(config.model))
        check_depth(config, architecture.num_layers)
        return Job(
            parallel=config.parallel,
            architecture=architecture,
            work=nothing,
            log_dir=Path(config.run_dir) / "logs" / "preflight",
            log_level=config.logging.level,
            launch=config.launch,
            needs=needs_of(config, architecture),
            preflight="always",
            tell=print,
        )

    return run_job(make)


def needs_of(config: Config, architecture: ModelArchitecture) -> Needs:
    """What a run of `config` asks of every node."""
    run_dir = Path(config.run_dir)
    own = run_dir / "checkpoints"
    named = [
        *(config.model.hf_path, config.model.checkpoint, config.nested.sensitivity_path),
        *(path for _, path in data_paths(config.data)),
        config.rollout.replay,
        None if config.checkpoint.resume in ("auto", "never") else config.checkpoint.resume,
    ]
    inputs = [Path(name) for name in named if name is not None]
    written = list_checkpoints(own)
    if config.checkpoint.resume == "auto" and written:
        inputs.append(list(written.values())[-1])
    return Needs(
        run_dir=run_dir,
        inputs=tuple(inputs),
        checkpoint_bytes=checkpoint_bytes(config.model, architecture),
        # What is there already goes once newer ones have been written.
        num_checkpoints=max(1, 2 - len(written)),
        require_gpu=config.launch.require_gpu,
        deadline_seconds=config.launch.preflight_deadline_seconds,
    )


def checkpoint_bytes(model: ModelConfig, architecture: ModelArchitecture) -> int:
    """Bytes of a checkpoint: weights and Adam's two moments; below float32 also float32 weights."""
    shapes = weight_map(architecture).hf_shapes.values()
    num_parameters = sum(math.prod(shape) for shape in shapes)
    return num_parameters * (12 if model.dtype == "float32" else 14)
