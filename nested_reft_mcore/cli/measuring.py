"""What `nested-reft bench` does, once its options are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from nested_reft_mcore.cli.entry import Job, run_job
from nested_reft_mcore.cli.files import COMMAND_LINE
from nested_reft_mcore.config.bench import (
    BenchRolloutOptions,
    check_bench_model,
    check_bench_rollout,
    parse_shape,
)
from nested_reft_mcore.config.bench_hardware import BenchHardwareOptions, check_bench_hardware
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.ranks import discover_ranks
from nested_reft_mcore.launch.signals import StopSignals


def run_bench_rollout(values: Mapping[str, Any]) -> int:
    """Measure generation; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(BenchRolloutOptions, values, COMMAND_LINE)
        check_bench_rollout(options)
        architecture = model_architecture(options.model())
        check_bench_model(options, architecture)

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.bench.rollout import bench_rollout

            bench_rollout(options, context)
            return 0

        return Job(
            options.parallel, architecture, work, check_batches=_check_replicas, seed=options.seed
        )

    return run_job(make)


def run_bench_hardware(values: Mapping[str, Any]) -> int:
    """Measure the machine; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(BenchHardwareOptions, values, COMMAND_LINE)
        check_bench_hardware(options)
        count = options.nproc
        if count is None and discover_ranks(os.environ) is None:
            count = _usual_processes()

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.bench.hardware_run import bench_hardware

            bench_hardware(options, context)
            return 0

        parallel = ParallelConfig(data_parallel_size=count)
        # No model is built: the processes are replicas of this one.
        architecture = parse_shape("hidden=8,layers=1,heads=1,groups=1,ffn=8,vocab=8")
        return Job(parallel, architecture, work)

    return run_job(make)


def _usual_processes() -> int:
    """One for each GPU; without any two, since links need two, where there are two cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, os.cpu_count() or 1)


def _check_replicas(data_parallel_size: int) -> None:
    if data_parallel_size > 1:
        raise UserError(
            f"the processes make {data_parallel_size} replicas of the model; expected 1, for one "
            "replica is what is measured"
        )
