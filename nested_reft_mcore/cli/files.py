"""The commands that work on files and directories: generate, score and convert."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nested_reft_mcore.checkpoints.staging import check_output_is_free
from nested_reft_mcore.cli.entry import Job, run_job
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import (
    ARCHITECTURE_FILE,
    read_checkpoint_architecture,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import (
    GenerateOptions,
    HfToMcoreOptions,
    McoreToHfOptions,
    ScoreOptions,
    check_generate,
    check_score,
    parse_size,
)
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.hf.config import model_architecture, read_architecture
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
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
        check_output_is_free(
            Path(options.output), marker=ARCHITECTURE_FILE, kind="checkpoints", force=options.force
        )

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.training.conversion import hf_to_mcore

            return hf_to_mcore(options, context)

        return Job(options.parallel, architecture, work)

    return _run_on_cpu(make)


def run_mcore_to_hf(values: Mapping[str, Any]) -> int:
    """Turn a checkpoint into a Hugging Face directory; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(McoreToHfOptions, values, COMMAND_LINE)
        parse_size("--max-shard-size", options.max_shard_size)
        architecture = read_checkpoint_architecture(options.checkpoint)
        check_output_is_free(
            Path(options.output),
            marker="config.json",
            kind="Hugging Face directories",
            force=options.force,
        )

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.training.conversion import mcore_to_hf

            return mcore_to_hf(options, context)

        return Job(options.parallel, architecture, work)

    return _run_on_cpu(make)


def run_inspect(directory: Path, checksums: bool, every_tensor: bool, as_json: bool) -> int:
    """Say what a directory of weights holds; returns the exit code. Raises UserError."""
    from nested_reft_mcore.training.inspection import inspect, print_inspection

    found = inspect(directory, checksums=checksums)
    print_inspection(found, every_tensor=every_tensor, as_json=as_json)
    return ExitCode.FAILURE if found.problems else ExitCode.OK


def _run_on_cpu(make: Callable[[], Job]) -> int:
    """Run a job that moves files about: any number of processes, with or without GPUs."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return run_job(make)


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
