"""A simulation as text, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nested_reft_mcore.simulation.failures import (
    FaultCost,
    best_interval,
    daly_interval,
    daly_share,
    young_interval,
)
from nested_reft_mcore.simulation.simulate import Comparison, Simulation

_NAMES = {"logprobs": "log-probs", "reduction": "gradients' sum"}
_MOST_WORST = 3


def simulation_report(
    simulation: Simulation,
    comparisons: Sequence[Comparison] = (),
    faults: FaultCost | None = None,
) -> str:
    """The simulation for people."""
    sections = [
        _asked(simulation),
        _step(simulation),
        _rollout(simulation),
        _waiting(simulation),
        _comparisons(comparisons),
        _faults(faults),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def simulation_record(
    simulation: Simulation,
    comparisons: Sequence[Comparison] = (),
    faults: FaultCost | None = None,
) -> dict[str, Any]:
    """The simulation for programs: seconds, shares, tokens a second."""
    run, scenario = simulation.run, simulation.scenario
    mean, deviation = simulation.step_seconds
    waiting = simulation.waiting()
    record: dict[str, Any] = {
        "fits": run.fits,
        "layout": {
            "tensor": run.layout.tensor,
            "pipeline": run.layout.pipeline,
            "virtual": run.layout.num_chunks,
            "data": run.layout.data,
            "world_size": run.layout.world_size,
        },
        "seed": scenario.seed,
        "steps": scenario.steps,
        "batching": scenario.batching,
        "groups": scenario.groups or run.layout.pipeline,
        "stragglers": asdict(scenario.stragglers),
        "lengths": {
            "law": simulation.law.kind,
            "mean": simulation.law.mean,
            "limit": simulation.law.limit,
            "cut_share": simulation.cut_share,
        },
        "step_seconds": mean,
        "step_seconds_deviation": deviation,
        "seconds": simulation.seconds,
        "plan_step_seconds": run.time.total,
        "tokens_per_second_per_gpu": simulation.tokens_per_second_per_gpu,
        "generated_per_second_per_gpu": simulation.generated_per_second_per_gpu,
        "generation_ceiling_per_gpu": simulation.generation_ceiling,
        "mean_rows": simulation.mean_rows,
        "slots": run.slots,
        "waiting_share": {name: share.tolist() for name, share in waiting.items()},
        "factors": simulation.factors.tolist(),
        "comparisons": [
            {"change": other.name, "generation": other.generation, "step": other.step}
            for other in comparisons
        ],
        "hardware": run.hardware.model_dump(mode="json"),
    }
    if faults is not None:
        record["faults"] = asdict(faults) | {
            "daly_share": daly_share(faults.course),
            "young_seconds": young_interval(faults.course),
            "daly_seconds": daly_interval(faults.course),
        }
    return record


def _asked(simulation: Simulation) -> list[str]:
    run, scenario, law = simulation.run, simulation.scenario, simulation.law
    layout, config = run.layout, run.config
    virtual = f" (x {layout.num_chunks} virtual)" if layout.num_chunks > 1 else ""
    longest = max(int(draw.responses.max()) for draw in simulation.draws)
    lines = [
        f"simulated: {layout.model_parameters / 1e9:.2f} billion parameters on "
        f"{layout.world_size} x {run.hardware.name} = TP {layout.tensor} x PP {layout.pipeline}"
        f"{virtual} x DP {layout.data}; {scenario.steps} steps, seed {scenario.seed}",
        f"step: {config.rollout.prompts_per_step} prompts x {config.rollout.group_size}; responses "
        f"{law.kind}, {law.mean:.0f} tokens on average, the longest {longest}, "
        f"{simulation.cut_share:.1%} cut at {law.limit}",
    ]
    if not run.fits:
        lines.append("note: it does not fit into memory (`nested-reft plan`); simulated as if")
    if simulation.factors.max() > 1:
        lines.append(
            f"stragglers: stages take {simulation.factors.min():.2f} to "
            f"{simulation.factors.max():.2f} times as long, {np.median(simulation.factors):.2f} in "
            "the middle"
        )
    return lines


def _step(simulation: Simulation) -> list[str]:
    mean, deviation = simulation.step_seconds
    parts = ", ".join(
        f"{_NAMES.get(name, name)} {part:.3g} s ({part / mean:.0%})"
        for name, part in simulation.seconds.items()
    )
    planned = simulation.run.time.total
    return [
        f"step: {mean:.4g} s +- {deviation:.2g} (the roofline of `plan`: {planned:.4g} s)",
        f"  {parts}",
        f"throughput: {simulation.tokens_per_second_per_gpu:,.0f} prompt and response tokens/s a "
        "GPU",
    ]


def _rollout(simulation: Simulation) -> list[str]:
    made, ceiling = simulation.generated_per_second_per_gpu, simulation.generation_ceiling
    rounds = np.mean([draw.rounds.num_rounds.mean() for draw in simulation.draws])
    groups = simulation.scenario.groups or simulation.run.layout.pipeline
    return [
        f"generation: {made:,.0f} response tokens/s a GPU, {made / ceiling:.0%} of the "
        f"{ceiling:,.0f} if no stage ever waited; {rounds:,.0f} rounds of {groups} slot groups, "
        f"{simulation.mean_rows:.0f} of {simulation.run.slots} slots decode on average "
        f"({simulation.scenario.batching} batching)"
    ]


def _waiting(simulation: Simulation) -> list[str]:
    lines = [f"{'waiting, share of':<20}{'for own replica':>24}{'for other replicas':>24}"]
    for name, phase in (("the step", None), ("generation", "generation"), ("update", "update")):
        shares = simulation.waiting(phase)
        cells = [
            f"{share.mean():.1%} ({share.min():.0%} to {share.max():.0%})"
            for share in (shares["inside"], shares["outside"])
        ]
        lines.append(f"{name:<20}{cells[0]:>24}{cells[1]:>24}")
    shares = simulation.waiting()
    by_stage = (shares["inside"] + shares["outside"]).mean(axis=0)
    if len(by_stage) > 1:
        cells = ", ".join(f"{stage}: {share:.1%}" for stage, share in enumerate(by_stage))
        lines.append(f"by stage, mean over replicas: {cells}")
    if len(shares["outside"]) > 1:
        waits = shares["outside"].min(axis=1)
        worst = ", ".join(str(replica) for replica in np.argsort(waits)[:_MOST_WORST])
        lines.append(f"replicas that the others wait for most: {worst}")
    return lines


def _comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    lines = [f"{'with the same draws':<44}{'generation takes':>18}{'step takes':>12}"]
    lines += [f"{c.name:<44}{c.generation:>17.2f}x{c.step:>11.2f}x" for c in comparisons]
    return lines


def _faults(faults: FaultCost | None) -> list[str]:
    if faults is None:
        return []
    course = faults.course
    steps = best_interval(course)
    return [
        f"failures: one every {course.mtbf / 3600:.3g} h, {faults.failures:.2f} a run; useful time "
        f"{faults.useful_share:.2%} +- {faults.error:.2%} (Daly 2006, without a lag: "
        f"{daly_share(course):.2%})",
        f"  done again {faults.lost_share:.2%}, stalls of saves {faults.saving_share:.2%}, down "
        f"{faults.restarting_share:.2%}; a save stalls {course.stall:.3g} s and is whole "
        f"{course.lag:.3g} s later, coming back takes {course.restart:.0f} s",
        f"  a checkpoint every {course.steps_per_save} steps, least is lost every {steps} "
        f"(of work: Young 1974 {young_interval(course):.0f} s, Daly {daly_interval(course):.0f} s)",
    ]
