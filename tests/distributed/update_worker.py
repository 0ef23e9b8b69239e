"""Processes that take whole updates, layout after layout, and tell what they measured."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_cases import build
from score_cases import compare_scores
from update_cases import (
    ALGORITHMS,
    configuration,
    given_rollouts,
    layout,
    learner_of,
    sampled_rollouts,
)

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import (
    OptimizerConfig,
    ParallelConfig,
)
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.checkpoint import save_weights
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.initialize import shutdown
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import named_parameters
from nested_reft_mcore.training.reference import ReferencePolicy
from nested_reft_mcore.training.trainer import check_plan_across_ranks, skip_schedule
from nested_reft_mcore.training.update import Learner, UpdateResult

DROPPED = {"reinforce/sequences": ("2,5", "1,4,6")}
"""Layers of either stage that the two updates leave out."""
SPREAD = "ppo_clip/decoupled"
"""What every layout also runs with a distributed optimizer and micro-batches filled by tokens."""
OPTIMIZERS = {
    "replicated": OptimizerConfig(lr=1e-3, clip_grad=0.5),
    "distributed": OptimizerConfig(lr=1e-3, clip_grad=0.5, use_distributed_optimizer=True),
}
OVERLAPPED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
Measured = dict[str, Any]
"""Numbers of one layout, by the name of what was measured."""


def measure_layouts(ranks: RankInfo, layouts: dict[str, dict[str, Any]]) -> dict[str, Measured]:
    """What `measure` finds in each layout, and errors of scores with all processes as shards."""
    found = {}
    for name, options in layouts.items():
        with layout(ranks, options) as (parallel, context):
            found[name] = measure(parallel, context)
    with layout(ranks, {"tensor_model_parallel_size": ranks.world_size}) as (_, context):
        found["scores"] = compare_scores(context.tensor)
    shutdown()
    return found


def measure(parallel: ParallelConfig, context: ParallelContext) -> Measured:
    """Metrics of updates, an on-policy update, and the digests of some plans."""
    found: Measured = {}
    padding: dict[str, list[float]] = {}
    for algorithm, optimizer_name, size in variants(context):
        policy, optimizer = build(parallel, context, optimizer=OPTIMIZERS[optimizer_name])
        learner = learner_of(policy, optimizer, configuration(ALGORITHMS[algorithm], size))
        updates = two_updates(learner, context, DROPPED.get(algorithm, ("", "")))
        padding[size] = [metrics.pop("perf/padding_share") for metrics in updates]
        found[f"{algorithm}/{optimizer_name}/{size}"] = updates
    found["padding"] = padding
    policy, optimizer = build(parallel, context)
    learner = learner_of(policy, optimizer, configuration())
    rollouts = sampled_rollouts(policy, PolicyDecoder(policy), LayerSkipPlan.full(8))
    advantages = torch.linspace(-1, 1, len(rollouts.rollouts))
    found["on policy"] = learner.update(
        learner.training_batch(rollouts).with_advantages(advantages)
    ).metrics
    schedule = skip_schedule(configuration(), policy)
    found["plans"] = [schedule.plan(step).digest() for step in range(20)]
    return found


def variants(context: ParallelContext) -> list[tuple[str, str, str]]:
    """Algorithm, optimizer and micro-batches: everything alone, one of each kind together."""
    spread = (SPREAD, "distributed", "40 tokens")
    if context.world_size > 1:
        return [*((name, "replicated", "4 rows") for name in ALGORITHMS), spread]
    kinds = (("replicated", "4 rows"), ("replicated", "2 rows"), ("distributed", "4 rows"))
    return [(name, optimizer, size) for name in ALGORITHMS for optimizer, size in kinds] + [spread]


def two_updates(
    learner: Learner, context: ParallelContext, dropped: tuple[str, str]
) -> list[dict[str, float]]:
    """Metrics of the two mini-batches of a step."""
    rollouts, advantages = given_rollouts(context)
    batch = learner.training_batch(rollouts).with_advantages(advantages)
    updates = [
        learner.update(minibatch, LayerSkipPlan.parse(plan, 8))
        for minibatch, plan in zip(batch.deal(2), dropped, strict=True)
    ]
    assert all(update.applied for update in updates)
    return [update.metrics for update in updates]


def disagree_about_a_plan(ranks: RankInfo) -> str:
    """The message where rank 1 draws the plan of another step."""
    with layout(ranks, {}) as (_, context):
        plan = LayerSkipPlan.parse("3,5" if context.rank == 1 else "2,5", 8)
        check_plan_across_ranks(LayerSkipPlan.parse("2,5", 8), context)
        try:
            check_plan_across_ranks(plan, context)
        except RuntimeError as error:
            return str(error)
    return ""


def overlapped_twins(ranks: RankInfo) -> list[Any]:
    """Rollouts and metrics of three steps, without and with everything overlapped, the latter in
    micro-batches of unlike lengths."""
    found = []
    for options, size in (({}, "4 rows"), (OVERLAPPED, "40 tokens")):
        with layout(ranks, {}) as (parallel, context):
            config = OptimizerConfig(lr=1e-2, **options)
            policy, optimizer = build(parallel, context, optimizer=config)
            decoder = PolicyDecoder(policy)
            learner = learner_of(policy, optimizer, configuration(micro_batches=size))
            steps = []
            for step in range(3):
                plan = LayerSkipPlan.parse(f"{step + 1},5", 8)
                # The same draws each time: what changes is the policy.
                rollouts = sampled_rollouts(policy, decoder, plan)
                advantages = torch.linspace(-1, 1, len(rollouts.rollouts))
                update = learner.update(
                    learner.training_batch(rollouts).with_advantages(advantages)
                )
                rows = [(r.token_ids, r.behavior_logprobs) for r in rollouts.rollouts]
                steps.append((rows, update.metrics))
            found.append(steps)
    return found


def skip_a_broken_update(ranks: RankInfo, options: dict[str, Any]) -> dict[str, bool]:
    """What an advantage and a weight that are NaN, on one process each, do to an update."""
    found = {}
    for optimizer_name, config in OPTIMIZERS.items():
        with layout(ranks, options) as (parallel, context):
            for cause in ("advantage", "gradient"):
                result = _broken_update(parallel, context, config, cause)
                found |= {f"{optimizer_name}/{cause}/{k}": v for k, v in result.items()}
    return found


def _broken_update(
    parallel: ParallelConfig, context: ParallelContext, config: OptimizerConfig, cause: str
) -> dict[str, bool]:
    """An update, a broken one, and the same as the first again: beside a twin's two."""
    rollouts, advantages = given_rollouts(context)
    histories: list[list[UpdateResult]] = []
    weights = []
    for is_broken in (True, False):
        policy, optimizer = build(parallel, context, optimizer=config)
        learner = learner_of(policy, optimizer, configuration())
        batch = learner.training_batch(rollouts).with_advantages(advantages)
        history = [learner.update(batch)]
        before = _weights(policy)
        if is_broken:
            history.append(_break(learner, policy, batch, cause))
            unchanged = all(
                torch.equal(a, b) for a, b in zip(before, _weights(policy), strict=True)
            )
        history.append(learner.update(batch))
        histories.append(history)
        weights.append(_weights(policy))
    broken, twin = histories
    return {
        "first applied": broken[0].applied,
        "broken applied": broken[1].applied,
        "unchanged": unchanged,
        "next applied": broken[2].applied,
        "weights of the twin": _equal(*weights),
        "changed by an update": not _equal(before, weights[0]),
        "metrics of the twin": broken[2].metrics == twin[1].metrics,
    }


def _break(learner: Learner, policy: Policy, batch: Any, cause: str) -> UpdateResult:
    context = policy.context
    if cause == "advantage":
        # On one replica, in one sequence.
        advantages = batch.advantages.clone()
        if context.data.rank == context.data.size - 1:
            advantages[1] = torch.nan
        return learner.update(replace(batch, advantages=advantages))
    # In one gradient of the first stage of the last replica, after a sound forward pass.
    handles = []
    if context.is_first_stage and context.data.rank == context.data.size - 1:
        weight = policy.layers[0].mlp.linear_fc1.weight
        handles = [weight.register_hook(lambda gradient: gradient * torch.nan)]
    result = learner.update(batch)
    for handle in handles:
        handle.remove()
    return result


def _weights(policy: Policy) -> list[torch.Tensor]:
    policy.sync_parameters()
    return [parameter.detach().clone() for _, parameter in named_parameters(policy)]


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def two_process_checks(ranks: RankInfo) -> dict[str, Any]:
    """What needs two processes and no reference."""
    found = {
        "disagreement": disagree_about_a_plan(ranks),
        "twins": overlapped_twins(ranks),
        "broken on two replicas": skip_a_broken_update(ranks, {}),
        "broken on two stages": skip_a_broken_update(ranks, {"pipeline_model_parallel_size": 2}),
        "padding": padding_at_two(ranks),
        "dropout": {
            "replicas": update_without_layers(ranks, {}),
            "stages": update_without_layers(ranks, {"pipeline_model_parallel_size": 2}),
            "shards": update_without_layers(ranks, {"tensor_model_parallel_size": 2}),
        },
        "reference": {
            "replicas": reference_policy(ranks, {}),
            "stages": reference_policy(ranks, {"pipeline_model_parallel_size": 2}),
            "shards": reference_policy(ranks, {"tensor_model_parallel_size": 2}),
        },
    }
    shutdown()
    return found


def update_without_layers(ranks: RankInfo, options: dict[str, Any]) -> dict[str, bool]:
    """What an update sees and moves that leaves out a layer of either half of the model."""
    plan = LayerSkipPlan.parse("2,5", 8)
    with layout(ranks, options) as (parallel, context):
        policy, optimizer = build(parallel, context, optimizer=OPTIMIZERS["replicated"])
        learner = learner_of(policy, optimizer, configuration())
        rollouts, advantages = given_rollouts(context)
        batch = learner.training_batch(rollouts).with_advantages(advantages)
        with policy.nested(plan):
            nested = learner.logprobs(batch)
        before = _weights(policy)
        update = learner.update(batch, plan)
        names = [name for name, _ in named_parameters(policy)]
        # A shard of the embedding may hold nothing but padding.
        is_moved = {
            name: not torch.equal(old, new)
            for name, old, new in zip(names, before, _weights(policy), strict=True)
            if "layers." in name
        }
        left = {name for name in is_moved if "layers.2." in name or "layers.5." in name}
        mask = batch.response_mask
        return {
            "sees the nested policy": torch.equal(update.logprobs[mask], nested[mask]),
            "moves the layers that ran, and no others": all(
                moved != (name in left) for name, moved in is_moved.items()
            ),
            "leaves out a layer here": 0 < len(left) < len(is_moved),
            "is the full policy again": not policy.plan.skipped,
            "tells": update.metrics["actor/num_dropped_layers"] == 2,
        }


def reference_policy(ranks: RankInfo, options: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """What a policy that has moved on does while the one it began as takes its place."""
    found = {}
    for optimizer_name, optimizer_options in (("replicated", {}), ("overlapped", OVERLAPPED)):
        with layout(ranks, options) as (parallel, context):
            config = OptimizerConfig(lr=1e-2, **optimizer_options)
            policy, optimizer = build(parallel, context, optimizer=config)
            found[optimizer_name] = _reference_policy(policy, optimizer, context)
    return found


def _reference_policy(
    policy: Policy, optimizer: PolicyOptimizer, context: ParallelContext
) -> dict[str, bool]:
    learner = learner_of(policy, optimizer, configuration())
    rollouts, advantages = given_rollouts(context)
    batch = learner.training_batch(rollouts).with_advantages(advantages)
    reference = ReferencePolicy(policy)
    initial, at_first = _weights(policy), learner.logprobs(batch)
    found = {}
    for _ in range(2):
        learner.update(batch)
    with reference.in_place():
        ref_logprobs = learner.logprobs(batch)
        found["reference weights"] = _equal(_weights(policy), initial)
    moved = learner.logprobs(batch)
    found["reference log-probs"] = torch.equal(ref_logprobs, at_first)
    found["moved"] = bool(((moved - at_first)[batch.response_mask].abs() > 1e-3).any())
    before = _weights(policy)
    refusals = {
        "update": lambda: learner.update(batch),
        "save": lambda: save_weights(policy, Path("nowhere")),
        "twice": lambda: reference.in_place().__enter__(),
    }
    for name, attempt in refusals.items():
        # Whatever goes wrong inside, the policy is itself again.
        try:
            with reference.in_place():
                attempt()
        except RuntimeError as error:
            found[f"refuses {name}"] = "reference" in str(error)
    found["restored"] = _equal(_weights(policy), before)
    found["still learns"] = learner.update(batch).applied
    with reference.in_place():
        found["again"] = torch.equal(learner.logprobs(batch), at_first)
    return found


def padding_at_two(ranks: RankInfo) -> dict[str, Any]:
    """Padded vocabulary at TP 2."""
    from padding_cases import padded_vocabulary

    with layout(ranks, {"tensor_model_parallel_size": 2}) as (parallel, context):
        return {
            name: dataclasses.asdict(case)
            for name, case in padded_vocabulary(parallel, context).items()
        }
