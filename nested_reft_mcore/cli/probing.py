"""What `nested-reft probe` does, once its options are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nested_reft_mcore.cli.entry import Job, run_job
from nested_reft_mcore.cli.files import COMMAND_LINE
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.config.probe import ProbeOptions, check_probe, check_probe_model
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.signals import StopSignals


def run_probe(values: Mapping[str, Any]) -> int:
    """Probe a model; returns the exit code. Raises UserError."""

    def make() -> Job:
        options = section_from_dict(ProbeOptions, values, COMMAND_LINE)
        check_probe(options)
        architecture = model_architecture(options.model())
        check_probe_model(options, architecture)

        def work(context: ParallelContext, stop: StopSignals) -> int:
            from nested_reft_mcore.analysis.probe import probe_policy

            probe_policy(options, context)
            return 0

        return Job(options.parallel, architecture, work, seed=options.seed)

    return run_job(make)
