"""What each run of a study will need and take, by the plan of `nested-reft plan`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.planning.hardware import HardwareProfile, load_hardware
from nested_reft_mcore.planning.run_plan import RunPlan, make_plan
from nested_reft_mcore.studies.grid import StudyRun
from nested_reft_mcore.studies.schema import ClusterSection


@dataclass(frozen=True)
class Cluster:
    """The machines that are planned for."""

    nodes: int
    gpus_per_node: int
    gpu_memory_gb: float | None
    hardware: HardwareProfile

    def nodes_of(self, world_size: int) -> int:
        """Machines that so many processes take."""
        return -(-world_size // self.gpus_per_node)


@dataclass(frozen=True)
class Prediction:
    """A run on a cluster: bytes of its worst rank, seconds of its training, or why it cannot be."""

    problem: str | None
    """Why it cannot fit; None where it does."""
    num_parameters: int | None = None
    nodes: int = 0
    gpus: int = 0
    """That the run occupies."""
    memory_gb: float | None = None
    """Of the worst rank, in 10^9 bytes."""
    step_seconds: float | None = None
    seconds: float | None = None
    """Of all steps; starts, evaluations and saves come on top."""
    tokens_per_second: float | None = None
    """Prompt and response tokens a second and GPU."""
    generation_share: float | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it."""
        return self.problem is None

    @property
    def gpu_hours(self) -> float | None:
        """Of the steps alone."""
        return None if self.seconds is None else self.gpus * self.seconds / 3600


def cluster_of(
    section: ClusterSection,
    path: Path,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu_memory_gb: float | None = None,
    hardware: str | None = None,
) -> Cluster:
    """The study's machines, or others where arguments say so.

    A profile that the study names as a file is looked for beside the study.

    Raises:
        UserError: no such profile, or one that is wrong.
    """
    name = hardware or section.hardware
    if hardware is None and Path(name).suffix in (".yaml", ".yml"):
        name = str(path.parent / name)
    assumed = [f"{key}={value}" for key, value in section.assume.items()]
    return Cluster(
        nodes or section.nodes,
        gpus_per_node or section.gpus_per_node,
        gpu_memory_gb or section.gpu_memory_gb,
        load_hardware(name, assumed if hardware is None else ()),
    )


def predict(runs: Iterable[StudyRun], cluster: Cluster) -> dict[str, Prediction]:
    """By the runs' names. Runs that differ in their seed only are planned once.

    Raises:
        UserError: what `train` would refuse whatever the machines.
    """
    known: dict[tuple[object, ...], Prediction] = {}
    found = {}
    for run in runs:
        key = (replace(run.point, seed=0),)
        if key not in known:
            known[key] = _predict(run, cluster)
        found[run.name] = known[key]
    return found


def _predict(run: StudyRun, cluster: Cluster) -> Prediction:
    world = run.point.world_size
    nodes = cluster.nodes_of(world)
    per_node = min(world, cluster.gpus_per_node)
    if nodes > cluster.nodes:
        return Prediction(
            f"needs {world} GPUs; {cluster.nodes} x {cluster.gpus_per_node} are there"
        )
    if world % per_node:
        return Prediction(
            f"{world} processes do not fill nodes of {cluster.gpus_per_node} GPUs evenly"
        )
    try:
        plan = make_plan(run.config, nodes, per_node, cluster.gpu_memory_gb, cluster.hardware)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None
    return _prediction(run, plan, nodes, world)


def _prediction(run: StudyRun, plan: RunPlan, nodes: int, world: int) -> Prediction:
    time = plan.time
    problem = "; ".join(plan.problems) or None
    remedy = next((advice.change for advice in plan.advice if advice.fits), None)
    if problem is not None and remedy is not None:
        problem = f"{problem}; it would fit with {remedy}"
    return Prediction(
        problem=problem,
        num_parameters=plan.layout.model_parameters,
        nodes=nodes,
        gpus=world,
        memory_gb=plan.worst.peak[1] / 1e9,
        step_seconds=time.total,
        seconds=time.total * run.num_steps,
        tokens_per_second=time.tokens_per_second,
        generation_share=time.generation / time.total,
    )
