"""`nested-reft simulate`. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nested_reft_mcore.cli.options import (
    Assume,
    Checkpoint,
    ConfigFile,
    GpuMemory,
    GpusPerNode,
    Hardware,
    Hf,
    Nodes,
    Overrides,
)

if TYPE_CHECKING:
    from nested_reft_mcore.simulation.failures import FaultCost
    from nested_reft_mcore.simulation.simulate import Scenario, Simulation

_RUNS = 2000


@dataclass(frozen=True)
class Wanted:
    """What the options say beside the scenario itself."""

    json_file: Path | None
    trace: Path | None
    plot: Path | None
    compare: bool
    node_mtbf_hours: float | None
    storage_gb_per_s: float
    restart_minutes: float


def simulate(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 8,
    gpu_memory: GpuMemory = None,
    hardware: Hardware = "h100",
    assume: Assume = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps, each with its own plan.")] = 4,
    seed: Annotated[int, typer.Option(metavar="N", help="Key of lengths and stragglers.")] = 0,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="lognormal|exponential|fixed|FILE",
            help="Response lengths; FILE: a number a line, or a run's rollouts/*.jsonl.",
        ),
    ] = "lognormal",
    length_spread: Annotated[
        float, typer.Option(metavar="S", help="Deviation of the logarithm of a length.")
    ] = 0.7,
    length_correlation: Annotated[
        float, typer.Option(metavar="R", help="Share of it that a prompt's samples have in common.")
    ] = 0.5,
    batching: Annotated[
        str, typer.Option(metavar="continuous|static", help="When a free slot is filled again.")
    ] = "continuous",
    groups: Annotated[
        int | None,
        typer.Option(metavar="G", help="Slot groups in flight; default: one for each stage."),
    ] = None,
    slow_share: Annotated[
        float, typer.Option(metavar="P", help="Share of GPUs that are slow, drawn.")
    ] = 0.0,
    slow_factor: Annotated[
        float, typer.Option(metavar="F", help="How much longer each of these takes.")
    ] = 1.2,
    jitter: Annotated[
        float, typer.Option(metavar="S", help="Deviation of the logarithm of every GPU's time.")
    ] = 0.0,
    slow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REPLICA[:STAGE]=F", help="One slow replica or stage; may be repeated."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Change one thing at a time, with the same draws.")
    ] = False,
    node_mtbf_hours: Annotated[
        float | None,
        typer.Option(metavar="H", help="Lose nodes: mean hours between failures of one node."),
    ] = None,
    storage_gb_per_s: Annotated[
        float, typer.Option(metavar="GB", help="The file system, for the whole job.")
    ] = 10.0,
    restart_minutes: Annotated[
        float, typer.Option(metavar="M", help="From noticing a failure to reading the checkpoint.")
    ] = 5.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a Chrome trace of the first step (Perfetto)."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw parts, waiting, the long tail.")
    ] = None,
    hf: Hf = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Simulate steps of `train`, pass by pass, on machines that need not exist.

    `plan` multiplies means; this draws a length for every completion, fills slots as the engine
    does, takes every slot group and micro-batch through every stage of every replica, and sees who
    waits for whom. What a pass costs is the same as in `plan`: a roofline of the stated machine,
    never measured on one. It starts nothing and takes seconds, for 1,024 GPUs too.
    docs/scaling.md says what came out for 7B, 32B and 70B.

    --slow-share, --jitter and --slow make stragglers: a tensor-parallel group is as slow as its
    slowest GPU. --node-mtbf-hours adds what lost nodes cost a run of train.num_steps steps with
    checkpoint.interval. Leaves with 0, or 2 for a mistake.

    \b
    Examples:
      nested-reft simulate examples/llama3.1_70b/config.yaml --nodes 128 \\
          rollout.prompts_per_step=2048 --trace step.json
      nested-reft simulate config.yaml --nodes 2 --compare --slow 0:1=1.5
      nested-reft simulate config.yaml --nodes 64 --node-mtbf-hours 20000
      nested-reft simulate config.yaml --lengths runs/first/rollouts/step_000010.dp0.jsonl
    """
    from nested_reft_mcore.cli.entry import leave
    from nested_reft_mcore.cli.runs import with_model

    def work() -> int:
        from nested_reft_mcore.config.errors import UserError
        from nested_reft_mcore.config.load import load_config
        from nested_reft_mcore.planning.hardware import load_hardware
        from nested_reft_mcore.simulation.simulate import Scenario
        from nested_reft_mcore.simulation.stragglers import Stragglers, parse_slow

        if batching not in ("continuous", "static"):
            raise UserError(f"--batching {batching}: expected `continuous` or `static`")
        scenario = Scenario(
            load_config(config, with_model(overrides or [], hf, checkpoint)),
            nodes,
            gpus_per_node,
            gpu_memory,
            load_hardware(hardware, assume or []),
            lengths,
            length_spread,
            length_correlation,
            batching,
            groups,
            Stragglers(slow_share, slow_factor, jitter, parse_slow(slow or [])),
            steps,
            seed,
        )
        wanted = Wanted(
            json_file, trace, plot, compare, node_mtbf_hours, storage_gb_per_s, restart_minutes
        )
        return run_simulation(scenario, wanted)

    leave(work)


def run_simulation(scenario: Scenario, wanted: Wanted) -> int:
    """Simulate, print and write what is wanted; 0. Raises UserError."""
    import json

    from nested_reft_mcore.config.errors import UserError, reason_of
    from nested_reft_mcore.simulation.report import simulation_record, simulation_report
    from nested_reft_mcore.simulation.simulate import compare, simulate

    made = simulate(scenario)
    faults = _faults(made, wanted)
    comparisons: Sequence = compare(made) if wanted.compare else ()
    print(simulation_report(made, comparisons, faults), flush=True)
    if wanted.json_file is not None:
        record = simulation_record(made, comparisons, faults)
        try:
            wanted.json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            text = f"--json {wanted.json_file}: cannot be written: {reason_of(error)}"
            raise UserError(text) from None
    if wanted.trace is not None:
        from nested_reft_mcore.simulation.timeline import write_trace

        count = write_trace(made, wanted.trace)
        print(f"trace: {count} events in {wanted.trace}; open it in ui.perfetto.dev", flush=True)
    if wanted.plot is not None:
        from nested_reft_mcore.simulation.plot import plot_simulation

        plot_simulation(made, wanted.plot)
    return 0


def _faults(made: Simulation, wanted: Wanted) -> FaultCost | None:
    if wanted.node_mtbf_hours is None:
        return None
    from nested_reft_mcore.simulation.failures import Faults, cost_of_faults

    faults = Faults(wanted.node_mtbf_hours, wanted.storage_gb_per_s, wanted.restart_minutes * 60)
    return cost_of_faults(made, faults, _RUNS)
