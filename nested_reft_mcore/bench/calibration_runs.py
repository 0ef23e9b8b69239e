"""Run directories as calibration needs them, and what the simulation makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.observability.tracking import METRICS_FILE
from nested_reft_mcore.planning.calibration_points import Point
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.lengths import read_lengths
from nested_reft_mcore.planning.measured_run import PARTS, Average, MeasuredRun, measured_run
from nested_reft_mcore.report.run_record import CONFIG_FILE, RunRecord, read_runs
from nested_reft_mcore.simulation.simulate import Scenario, simulate

_SIMULATED = {
    "generation": ("generation",),
    "logprobs": ("logprobs",),
    "update": ("update", "reduction", "optimizer"),
    "rest": ("judging", "rest"),
}


def find_runs(paths: Sequence[Path], say: Callable[[str], None] = print) -> list[MeasuredRun]:
    """Runs of `train` in these directories, or in directories inside of them.

    Of those inside, a run that cannot be used, such as an unfinished one, is named and left out.

    Raises:
        UserError: a directory that is no run and has none inside, or a run without times.
    """
    directories: list[Path] = []
    for path in paths:
        if (path / METRICS_FILE).is_file():
            directories.append(path)
            continue
        inside = sorted(file.parent for file in path.glob(f"*/{METRICS_FILE}"))
        if not inside:
            raise UserError(f"{path}: no run directory, and none inside: {METRICS_FILE} is missing")
        directories += inside
    found: list[MeasuredRun] = []
    for record in read_runs(directories):
        try:
            found.append(_measured(record))
        except UserError as error:
            if record.directory in paths:
                raise
            say(f"left out: {error}")
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no run inside can be used")
    return found


def simulated_seconds(profile: HardwareProfile, point: Point, average: Average) -> dict[str, float]:
    """Seconds of each part of a point's step, by `simulate`: averages over steps and runs."""
    steps = [step for run in point.runs for step in _simulated_steps(run, profile)]
    return {
        part: average([sum(step[name] for name in names) for step in steps])
        for part, names in _SIMULATED.items()
        if part in PARTS
    }


def _simulated_steps(run: MeasuredRun, profile: HardwareProfile) -> list[dict[str, float]]:
    layout = run.layout
    lengths = {length for group in run.expected.responses for length in group}
    made = simulate(
        Scenario(
            run.config,
            nodes=-(-layout.world_size // layout.gpus_per_node),
            gpus_per_node=layout.gpus_per_node,
            hardware=profile,
            lengths="fixed" if len(lengths) == 1 else "lognormal",
            # The first one is left out, as in the run: so each step has the run's own plan.
            steps=len(run.steps) + 1,
        )
    )
    return [step.seconds for step in made.steps[1:]]


def _measured(record: RunRecord) -> MeasuredRun:
    config = load_config(record.directory / CONFIG_FILE)
    environment = record.environment
    world_size = environment.get("world_size")
    if not isinstance(world_size, int):
        raise UserError(f"{record.directory}: environment.json does not say how many processes")
    variables: dict[str, Any] = environment.get("variables") or {}
    local = int(variables.get("LOCAL_WORLD_SIZE") or world_size)
    responses: list[int] = []
    for file in sorted((record.directory / "rollouts").glob("step_*.jsonl")):
        responses += read_lengths(file)
    return measured_run(
        record.name, config, world_size, local, record.steps, record.plans, responses
    )
