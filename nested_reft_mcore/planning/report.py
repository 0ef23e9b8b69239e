"""A plan as text, and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.planning.generation_memory import CacheMemory
from nested_reft_mcore.planning.memory import RankMemory
from nested_reft_mcore.planning.run_plan import RunPlan

_MOST_STAGES = 8


def plan_report(plan: RunPlan) -> str:
    """The plan for people: what is asked, memory, verdict, time."""
    sections = [_asked(plan), _memory(plan), _verdict(plan), _time(plan), _gains(plan)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def plan_record(plan: RunPlan) -> dict[str, Any]:
    """The plan for programs: bytes and seconds."""
    layout, time = plan.layout, plan.time
    return {
        "fits": plan.fits,
        "problems": plan.problems,
        "advice": [
            {"change": str(a.change), "fits": a.fits, "worst_bytes": a.worst_bytes}
            for a in plan.advice
        ],
        "model_parameters": layout.model_parameters,
        "layout": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual": layout.num_chunks,
            "data": layout.data,
            "world_size": layout.world_size,
        },
        "usable_bytes": plan.room,
        "ranks": [_rank_record(plan, rank) for rank in plan.ranks],
        "host_bytes": asdict(plan.host) | {"total": plan.host.total},
        "slots": plan.slots,
        "seconds": {
            "generation": time.generation,
            "logprobs": time.logprobs,
            "update": time.update,
            "rest": time.rest,
            "step": time.total,
        },
        "pipeline_bubble": time.bubble,
        "tokens_per_second_per_gpu": time.tokens_per_second,
        "gains": [asdict(gain) for gain in plan.gains],
        "head_cost": plan.head_cost,
        "hardware": plan.hardware.model_dump(mode="json"),
    }


def _rank_record(plan: RunPlan, rank: RankMemory) -> dict[str, Any]:
    return {
        "stage": rank.stage,
        "parameters": plan.layout.parameters(rank.stage),
        **asdict(rank.static),
        **asdict(rank.update),
        "kv_cache": rank.rollout.cache,
        "kv_bytes_per_slot": rank.rollout.bytes_per_slot,
        "generation_working": rank.rollout.working,
        "saving": rank.saving,
        "moments": rank.moments,
        "peak": rank.peak[1],
    }


def _asked(plan: RunPlan) -> list[str]:
    layout, shape, workload = plan.layout, plan.layout.architecture, plan.workload
    virtual = f" (x {layout.num_chunks} virtual)" if layout.num_chunks > 1 else ""
    lines = [
        f"model: {layout.model_parameters / 1e9:.2f} billion parameters, {shape.num_layers} layers "
        f"of width {shape.hidden_size}, {plan.config.model.dtype}",
        f"layout: {layout.world_size} GPUs = TP {layout.tensor} x PP {layout.pipeline}{virtual} x "
        f"DP {layout.data}, {layout.gpus_per_node} a node",
        f"step: {workload.num_prompts * layout.data} prompts x {plan.config.rollout.group_size} "
        f"completions, sequences of up to {workload.longest} tokens; micro-batches of up to "
        f"{workload.shape.tokens} tokens, {workload.num_micro_batches} an update and replica where "
        "all are longest",
    ]
    if not layout.tensor_is_local:
        lines.append("note: tensor-parallel ranks are on several nodes, which is slow")
    return lines


def _memory(plan: RunPlan) -> list[str]:
    ranks = _shown(plan)
    rows: list[tuple[str, list[str]]] = [
        ("GB of each rank", [f"stage {rank.stage}" for rank in ranks]),
        ("parameters (billion)", [f"{plan.layout.parameters(r.stage) / 1e9:.3f}" for r in ranks]),
        ("weights", [_gb(rank.static.weights) for rank in ranks]),
        ("gradients", [_gb(rank.static.gradients) for rank in ranks]),
        (_optimizer_name(plan), [_gb(rank.static.optimizer) for rank in ranks]),
        ("update: activations", [_gb(rank.update.activations) for rank in ranks]),
        ("update: logits chunk", [_gb(rank.update.logits) for rank in ranks]),
        ("update: working", [_gb(rank.update.working) for rank in ranks]),
        ("rollout: KV cache", [_gb(rank.rollout.cache) for rank in ranks]),
        ("rollout: working", [_gb(rank.rollout.working) for rank in ranks]),
    ]
    if any(rank.saving for rank in ranks):
        rows.append(("saving: gathered state", [_gb(rank.saving) for rank in ranks]))
    rows.append(("most at once", [_gb(rank.peak[1]) for rank in ranks]))
    rows.append(("in", [rank.peak[0] for rank in ranks]))
    lines = [f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    if len(ranks) < len(plan.ranks):
        lines.append(f"(first, last and worst of {len(plan.ranks)} stages)")
    lines.append(_slots_line(plan))
    return [*lines, _host_line(plan)]


def _shown(plan: RunPlan) -> list[RankMemory]:
    """All stages, or of many the first, the worst and the last."""
    if len(plan.ranks) <= _MOST_STAGES:
        return list(plan.ranks)
    chosen = {0, len(plan.ranks) - 1, plan.worst.stage}
    return [plan.ranks[stage] for stage in sorted(chosen)]


def _optimizer_name(plan: RunPlan) -> str:
    spread = plan.config.optimizer.use_distributed_optimizer
    return f"optimizer (over {plan.layout.data})" if spread else "optimizer (replicated)"


def _slots_line(plan: RunPlan) -> str:
    cache: CacheMemory = max((r.rollout for r in plan.ranks), key=lambda c: c.bytes_per_slot)
    return (
        f"slots: {plan.slots} of {cache.wanted_slots} wanted, {cache.bytes_per_slot / 1e6:.1f} MB "
        f"each at {plan.workload.slot_length} positions, in the plan that skips least on a stage"
    )


def _host_line(plan: RunPlan) -> str:
    host = plan.host
    return (
        f"host memory of the fullest node: {_gb(host.total)} GB (reference policy "
        f"{_gb(host.reference)}, checkpoint being written {_gb(host.saving)})"
    )


def _verdict(plan: RunPlan) -> list[str]:
    assumed, worst = plan.hardware.assumptions, plan.worst
    name, needed = worst.peak
    usable = (
        f"{plan.room / 1e9:.1f} GB of {plan.memory_gb:g} ({assumed.reserve_gb:g} GB for CUDA and "
        f"NCCL, {assumed.fragmentation:.0%} lost to fragmentation)"
    )
    if plan.fits:
        return [
            f"FITS: the worst rank, of stage {worst.stage}, needs {needed / 1e9:.1f} GB in the "
            f"{name}; usable are {usable}; {(plan.room - needed) / 1e9:.1f} GB are left"
        ]
    lines = [f"DOES NOT FIT: usable are {usable}"]
    lines += [f"  {problem}" for problem in plan.problems]
    if plan.advice and plan.advice[0].fits:
        lines.append("it would fit with:")
    elif plan.advice:
        lines.append("no change that was tried makes it fit; closest:")
    lines += [f"  {a.change}   ({a.worst_bytes / 1e9:.1f} GB at most)" for a in plan.advice]
    return lines


def _time(plan: RunPlan) -> list[str]:
    time = plan.time
    parts = {
        "generation": time.generation,
        "log-probs": time.logprobs,
        "update": time.update,
        "rest": time.rest,
    }
    split = ", ".join(
        f"{name} {part:.3g} s ({part / time.total:.0%})" for name, part in parts.items()
    )
    changed = plan.hardware.assumptions.model_dump()
    assumed = ", ".join(f"{name}={value:g}" for name, value in changed.items())
    if_it_fit = "" if plan.fits else " (if it did fit)"
    return [
        f"predicted step on {plan.hardware.name}{if_it_fit}: {time.total:.3g} s: {split}",
        f"throughput: {time.tokens_per_second:,.0f} tokens/s a GPU, "
        f"{time.tokens_per_second * time.world_size:,.0f} in all; pipeline bubble of the update "
        f"{time.bubble:.0%}",
        f"assumed (--assume NAME=VALUE): {assumed}",
        f"hardware: {plan.hardware.source or 'as given'}",
    ]


def _gains(plan: RunPlan) -> list[str]:
    config, layers = plan.config, plan.layout.architecture.num_layers
    if config.nested.law == "sensitivity":
        return [
            "skipping: law `sensitivity` draws from its probe; memory and time are those of full "
            "depth here, and the log of `train` says what it gains"
        ]
    if not plan.gains:
        return ["skipping: nothing is skipped"]
    count, part = num_skipped(config.nested, layers), config.nested.part
    lines = [
        f"skipping {count} of {layers} ({part}), against full depth:",
        f"  {'law':<16}{'fullest stage':>14}{'generation':>12}{'step':>8}",
    ]
    for gain in plan.gains:
        mark = "  <- nested.law" if gain.law == config.nested.law else ""
        lines.append(
            f"  {gain.law:<16}{gain.counted:>13.2f}x{gain.generation:>11.2f}x{gain.step:>7.2f}x"
            f"{mark}"
        )
    lines.append(
        f"the vocabulary head takes as long as {plan.head_cost:.1f} layers here: "
        f"nested.head_cost={plan.head_cost:.1f} lets `stage_balanced` know (it is "
        f"{config.nested.head_cost:g})"
    )
    return lines


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"
