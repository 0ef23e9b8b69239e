"""The commands that work on files and directories: generate, score and convert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_reft_mcore.cli.entry import Job, run_job
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import read_checkpoint_architecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import (
    GenerateOptions,
    HfToMcoreOptions,
    McoreToHfOptions,
    ScoreOptions,
    check_generate,
    check_score,
)
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.hf.config import model_architecture, read_architecture
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.signals import StopSignals

COMMAND_LINE = "command line"


def run_generate(values: Mapping[str, Any]) -> int:
    """Complete the prompts of a file; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(GenerateOptions, values, COMMAND_LINE)
        check_generate(options)
        architecture = model_architecture(options.model())
        check_skip_layers(options.skip_layers, architecture)

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.training.inference import generate_file

            generate_file(options, context)
            return 0

        return Job(options.parallel, architecture, work, seed=options.seed)

    return run_job(make)


def run_score(values: Mapping[str, Any]) -> int:
    """Score the completions of a file; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(ScoreOptions, values, COMMAND_LINE)
        check_score(options)
        architecture = model_architecture(options.model())
        check_skip_layers(options.skip_layers, architecture)

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.training.inference import score_file

            score_file(options, context)
            return 0

        return Job(options.parallel, architecture, work)

    return run_job(make)


def run_hf_to_mcore(values: Mapping[str, Any]) -> int:
    """Turn a Hugging Face directory into a checkpoint; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(HfToMcoreOptions, values, COMMAND_LINE)
        architecture = read_architecture(Path(options.hf))
        check_output(options.output, force=options.force)

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.training.conversion import hf_to_mcore

            hf_to_mcore(options, context)
            return 0

        return Job(options.parallel, architecture, work)

    return run_job(make)


def run_mcore_to_hf(values: Mapping[str, Any]) -> int:
    """Turn a checkpoint into a Hugging Face directory; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(McoreToHfOptions, values, COMMAND_LINE)
        architecture = read_checkpoint_architecture(options.checkpoint)
        check_output(options.output, force=options.force)

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.training.conversion import mcore_to_hf

            mcore_to_hf(options, context)
            return 0

        return Job(options.parallel, architecture, work)

    return run_job(make)


def check_output(output: str, *, force: bool) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: `output` is a file, or a directory with something in it and no `force`.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path}: is a file; expected a directory to write")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UserError(
            f"--output {path}: is not empty; choose another, or replace it with --force"
        )


def check_skip_layers(text: str | None, architecture: ModelArchitecture) -> None:
    """Refuse a list of skipped layers that cannot be read or names layers that are not there.

    Raises:
        UserError: names the entry.
    """
    from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan

    try:
        LayerSkipPlan.parse(text or "", architecture.num_layers)
    except ValueError as error:
        raise UserError(f"--skip-layers {text}: {error}") from None
