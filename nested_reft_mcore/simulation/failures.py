"""What lost nodes cost a run: work since the last whole checkpoint, and coming back.

Failures come at a constant rate, each ends the job, and the job begins again from the newest
checkpoint that is whole. The best time between two checkpoints is known for saves that block:
Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974) 530; Daly,
"A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006) 303.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.planning.layer_costs import FLOAT32
from nested_reft_mcore.planning.run_plan import RunPlan
from nested_reft_mcore.planning.workload import ITEMSIZE
from nested_reft_mcore.simulation.simulate import Simulation
from nested_reft_mcore.simulation.step import StepSimulator


@dataclass(frozen=True)
class Faults:
    """How often nodes are lost, and how fast a run is back; seconds where nothing else is said."""

    node_mtbf_hours: float
    """Mean time between two failures of one node."""
    storage_gb_per_s: float = 10.0
    """What the whole job writes to or reads from the shared file system, in 10^9 bytes."""
    restart_seconds: float = 300.0
    """Waiting for a node and starting all processes, before weights are read."""

    def check(self) -> None:
        """Raises UserError: a value that cannot be."""
        for name, value in (
            ("--node-mtbf-hours", self.node_mtbf_hours),
            ("--storage-gb-per-s", self.storage_gb_per_s),
        ):
            if not value > 0:
                raise UserError(f"{name} {value:g}: expected more than 0")
        if not 0 <= self.restart_seconds < math.inf:
            raise UserError(f"--restart-minutes {self.restart_seconds / 60:g}: expected 0 or more")


@dataclass(frozen=True)
class Course:
    """A run's rhythm, in seconds."""

    work: float
    """Of one step."""
    steps_per_save: int
    stall: float
    """Of one save, in which no step goes on."""
    lag: float
    """From the end of the stall until the checkpoint is whole."""
    restart: float
    """From a failure to the first step after it."""
    mtbf: float
    """Between two failures of any node."""

    @property
    def cycle(self) -> float:
        """From one save to the next."""
        return self.work * self.steps_per_save + self.stall

    def with_interval(self, steps: int) -> Course:
        """The same with another number of steps between two saves."""
        return Course(self.work, steps, self.stall, self.lag, self.restart, self.mtbf)


@dataclass(frozen=True)
class FaultCost:
    """What a run took; means over runs."""

    course: Course
    useful_share: float
    """Of all time: seconds of steps that count."""
    error: float
    """Standard error of it."""
    failures: float
    """Of a run."""
    lost_share: float
    """Of all time: steps that had to be done again."""
    saving_share: float
    """Of all time: stalls of saves."""
    restarting_share: float
    """Of all time: down, or coming back."""


def checkpoint_bytes(run: RunPlan) -> int:
    """Weights, masters and moments of the whole model."""
    itemsize = ITEMSIZE[run.config.model.dtype]
    state = 2 * FLOAT32 + (FLOAT32 if itemsize < FLOAT32 else 0)
    return run.layout.model_parameters * (itemsize + state)


def course_of(run: RunPlan, step_seconds: float, snapshot_seconds: float, faults: Faults) -> Course:
    """The rhythm of a planned run.

    Args:
        run: Says how often it saves, whether in the background, and how many bytes.
        step_seconds: Of a step with its part of the snapshots.
        snapshot_seconds: That part.
        faults: Rates.

    Raises:
        UserError: the run saves nothing, or a rate cannot be.
    """
    faults.check()
    checkpoint = run.config.checkpoint
    if not checkpoint.interval:
        raise UserError(
            "checkpoint.interval=0 saves nothing, so every failure loses the run; expected 1 or "
            "more with --node-mtbf-hours"
        )
    moved = checkpoint_bytes(run) / (faults.storage_gb_per_s * 1e9)
    stall = snapshot_seconds * checkpoint.interval
    lag = moved if checkpoint.async_save else 0.0
    nodes = max(1, -(-run.layout.world_size // run.layout.gpus_per_node))
    detect = run.config.launch.peer_deadline_seconds
    return Course(
        step_seconds - snapshot_seconds,
        checkpoint.interval,
        stall if checkpoint.async_save else stall + moved,
        lag,
        detect + faults.restart_seconds + moved,
        faults.node_mtbf_hours * 3600 / nodes,
    )


def daly_share(course: Course) -> float:
    """Share of useful time that Daly expects, for saves without a lag (his equation 13)."""
    work, mtbf = course.work * course.steps_per_save, course.mtbf
    wall = mtbf * math.exp(course.restart / mtbf) * math.expm1((work + course.stall) / mtbf)
    return work / wall


def young_interval(course: Course) -> float:
    """Seconds of work between two saves that lose least, to first order: sqrt(2 stall mtbf)."""
    return math.sqrt(2 * course.stall * course.mtbf)


def daly_interval(course: Course) -> float:
    """The same to higher order (Daly, equation 37), for stalls below twice the mtbf."""
    ratio = course.stall / (2 * course.mtbf)
    if ratio >= 1:
        return course.mtbf
    order = 1 + math.sqrt(ratio) / 3 + ratio / 9
    return young_interval(course) * order - course.stall


def best_interval(course: Course) -> int:
    """Steps between two saves that lose least: Daly's, but no save begins before the last ends."""
    fastest = math.ceil(course.lag / course.work)
    return max(1, fastest, round(daly_interval(course) / course.work))


def run_with_faults(course: Course, num_steps: int, num_runs: int, seed: int) -> FaultCost:
    """Runs of `num_steps` steps with failures drawn; a failure while coming back counts too.

    The last step is followed by a save that has to become whole.
    """
    rng = np.random.default_rng([seed, 2])
    rows = [_one_run(course, num_steps, rng) for _ in range(num_runs)]
    wall, failures, down, saves = (np.asarray(column) for column in zip(*rows, strict=True))
    useful = num_steps * course.work
    shares = useful / wall
    stalls = saves * course.stall / wall
    return FaultCost(
        course,
        float(shares.mean()),
        float(shares.std() / math.sqrt(max(1, num_runs - 1))),
        float(failures.mean()),
        float((1 - shares - stalls - down / wall).mean()),
        float(stalls.mean()),
        float((down / wall).mean()),
    )


def cost_of_faults(simulation: Simulation, faults: Faults, num_runs: int) -> FaultCost:
    """What failures cost runs of `train.num_steps` such steps. UserError as of `course_of`."""
    model = StepSimulator(simulation.run, simulation.factors).model
    course = course_of(simulation.run, simulation.step_seconds[0], model.snapshot_seconds(), faults)
    steps = simulation.run.config.train.num_steps
    return run_with_faults(course, steps, num_runs, simulation.scenario.seed)


_MOST_FAILURES = 100_000


def _one_run(
    course: Course, num_steps: int, rng: np.random.Generator
) -> tuple[float, int, float, int]:
    """Seconds, failures, seconds of being down, saves that counted."""
    wall = down = 0.0
    done = failures = saves = 0
    while failures < _MOST_FAILURES:
        left = num_steps - done
        num_saves = -(-left // course.steps_per_save)
        needed = left * course.work + num_saves * course.stall + course.lag
        alive = rng.exponential(course.mtbf)
        if alive >= needed:
            return wall + needed, failures, down, saves + num_saves
        whole = min(num_saves - 1, max(0, math.floor((alive - course.lag) / course.cycle)))
        done += whole * course.steps_per_save
        saves += whole
        wall += alive
        failures += 1
        # Down until nothing fails for as long as coming back takes.
        back = course.restart
        while (
            failures < _MOST_FAILURES and (again := rng.exponential(course.mtbf)) < course.restart
        ):
            back += again
            failures += 1
        wall += back
        down += back
    raise UserError(
        f"--node-mtbf-hours: a node is lost every {course.mtbf:.0f} s, which no checkpoint "
        f"survives (one every {course.cycle:.0f} s); expected a longer time, or a smaller "
        "checkpoint.interval"
    )
