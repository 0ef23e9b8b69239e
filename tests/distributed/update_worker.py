"""Processes that take whole updates, layout after layout, and tell what they measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from model_cases import VOCAB_SIZE, architecture, build
from score_cases import compare_scores

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    NestedConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.checkpoint import save_weights
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import named_parameters
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.types import (
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutStats,
    SamplingParams,
)
from nested_reft_mcore.training.reference import ReferencePolicy
from nested_reft_mcore.training.trainer import check_plan_across_ranks, skip_schedule
from nested_reft_mcore.training.update import Learner, UpdateResult

NUM_PROMPTS, GROUP_SIZE, TEMPERATURE = 8, 2, 0.7
ALGORITHMS = {
    "reinforce/base": AlgorithmConfig(objective="reinforce", rollout_is="base"),
    # Weights, rejections and denominators of whole sequences.
    "reinforce/sequences": AlgorithmConfig(
        objective="reinforce",
        rollout_is="geometric",
        rollout_rs="seq_mean_k1,token_k3",
        rollout_rs_threshold="3,2",
        loss_agg_mode="seq-mean-token-mean",
    ),
    # Bounds so narrow that the second update meets them.
    "ppo_clip/decoupled": AlgorithmConfig(
        objective="ppo_clip", rollout_is="retrace", clip_ratio_low=0.02, clip_ratio_high=0.02
    ),
}
SPREAD = "ppo_clip/decoupled"
"""What every layout also runs with a distributed optimizer and micro-batches filled by tokens."""
OPTIMIZERS = {
    "replicated": OptimizerConfig(lr=1e-3, clip_grad=0.5),
    "distributed": OptimizerConfig(lr=1e-3, clip_grad=0.5, use_distributed_optimizer=True),
}
MICRO_BATCHES = {
    "4 rows": {"micro_batch_size": 4},
    "2 rows": {"micro_batch_size": 2},
    # The longest sequence has 15.
    "40 tokens": {"max_tokens_per_micro_batch": 40, "logprob_chunk_tokens": 7},
}
OVERLAPPED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
Measured = dict[str, Any]
"""Numbers of one layout, by the name of what was measured."""


@contextmanager
def layout(ranks: RankInfo, options: dict[str, Any]) -> Iterator[tuple[Any, ParallelContext]]:
    """Megatron's groups for one layout; the processes stay together for the next one."""
    parallel = ParallelConfig(**options)
    yield parallel, initialize_parallel(parallel, ranks, seed=0)
    parallel_state.destroy_model_parallel()


def configuration(
    algorithm: AlgorithmConfig = ALGORITHMS["reinforce/base"], micro_batches: str = "4 rows"
) -> Config:
    """What a Learner reads, and a law of plans."""
    return Config(
        run_dir="unused",
        model=ModelConfig(architecture=architecture()),
        nested=NestedConfig(num_skipped=3, law="uniform"),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        algorithm=algorithm,
        train=TrainConfig(**MICRO_BATCHES[micro_batches]),
    )


def learner_of(policy: Policy, optimizer: PolicyOptimizer, config: Config) -> Learner:
    return Learner(config, policy, optimizer, None, 0, Timers())


def given_rollouts(context: ParallelContext) -> tuple[RolloutBatch, torch.Tensor]:
    """This replica's share of rollouts that nobody sampled, and advantages of unlike sizes."""
    generator = torch.Generator().manual_seed(8)
    rollouts, advantages = [], []
    for number in range(NUM_PROMPTS * GROUP_SIZE):
        lengths = torch.randint(2, 9, (2,), generator=generator).tolist()
        prompt, response = (
            tuple(torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in lengths
        )
        # Around the log-prob of a uniform draw: ratios on both sides of 1.
        logprobs = -3.7 + 1.5 * torch.randn(lengths[1], generator=generator)
        place, sample = divmod(number, GROUP_SIZE)
        rollouts.append(
            Rollout(Prompt(prompt, ""), place, sample, response, tuple(logprobs.tolist()), "stop")
        )
        advantages.append(10.0 ** (number % 3 - 1) * (-1) ** number)
    share = shard_range(NUM_PROMPTS, context.data.rank, context.data.size)
    rows = slice(share.start * GROUP_SIZE, share.stop * GROUP_SIZE)
    batch = RolloutBatch(
        tuple(rollouts[rows]), GROUP_SIZE, LayerSkipPlan.full(8), RolloutStats(0, 0.0)
    )
    return batch, torch.tensor(advantages[rows])


def sampled_rollouts(
    policy: Policy, decoder: PolicyDecoder, plan: LayerSkipPlan, step: int = 0
) -> RolloutBatch:
    """This replica's share of what the policy samples under `plan`."""
    data = policy.context.data
    generator = torch.Generator().manual_seed(21)
    prompts = [
        Prompt(tuple(torch.randint(0, VOCAB_SIZE, (2 + n % 3,), generator=generator).tolist()), "")
        for n in range(NUM_PROMPTS)
    ]
    share = shard_range(NUM_PROMPTS, data.rank, data.size)
    sampling = SamplingParams(6, temperature=TEMPERATURE, stop_token_ids=(7,), seed=2, step=step)
    with policy.nested(plan):
        return RolloutEngine(6).generate(
            decoder,
            prompts[share.start : share.stop],
            GROUP_SIZE,
            sampling,
            plan,
            first_prompt_index=share.start,
        )


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
        updates = two_updates(learner, context)
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


def two_updates(learner: Learner, context: ParallelContext) -> list[dict[str, float]]:
    """Metrics of the two mini-batches of a step."""
    rollouts, advantages = given_rollouts(context)
    batch = learner.training_batch(rollouts).with_advantages(advantages)
    updates = [learner.update(minibatch) for minibatch in batch.deal(2)]
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
        "reference": {
            "replicas": reference_policy(ranks, {}),
            "stages": reference_policy(ranks, {"pipeline_model_parallel_size": 2}),
            "shards": reference_policy(ranks, {"tensor_model_parallel_size": 2}),
        },
    }
    shutdown()
    return found


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
