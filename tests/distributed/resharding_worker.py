"""Processes that save with tensor and pipeline parallelism and go on in other layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model_cases import architecture, build, forward_backward, training_batch
from update_cases import layout

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import ModelConfig, OptimizerConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.checkpoint import load_checkpoint, save_weights
from nested_reft_mcore.mcore.initialize import shutdown
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import initialize_weights

# Padded to 1024 rows at TP 1 and 2, to 1536 at TP 4.
VOCAB_SIZE = 1003
PLAN = LayerSkipPlan.full(8)
NUM_STEPS = 2
"""Steps after the checkpoint: the second one's loss depends on the moments."""

Course = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def reshard(
    ranks: RankInfo, cases: dict[str, dict[str, Any]], root: Path
) -> dict[str, dict[str, Course]]:
    """Save every case in the layout of its `origin`, go on there and in all its `layouts`."""
    courses: dict[str, dict[str, Course]] = {name: {} for name in cases}
    for name, case in cases.items():
        courses[name] = _go_on(ranks, case, root / name)
    shutdown()
    return courses


def _go_on(ranks: RankInfo, case: dict[str, Any], saved: Path) -> dict[str, Course]:
    with layout(ranks, case["origin"]) as (parallel, context):
        policy, optimizer = _start(parallel, context, case)
        _course(policy, optimizer, 2)
        save_weights(policy, saved, optimizer=optimizer, state={"step": 2})
        courses = {"origin": _course(policy, optimizer, NUM_STEPS)}
    for name, options in case["layouts"].items():
        with layout(ranks, options) as (parallel, context):
            policy, optimizer = _start(parallel, context, case)
            initialize_weights(policy, seed=99)
            load_checkpoint(policy, optimizer, saved)
            courses[name] = _course(policy, optimizer, NUM_STEPS)
    return courses


def _start(parallel: Any, context: Any, options: dict[str, Any]) -> tuple[Policy, PolicyOptimizer]:
    untied = options.get("untied", False)
    shape = architecture(vocab_size=VOCAB_SIZE, untie_embeddings_and_output_weights=untied)
    shape = shape.model_copy(update={"num_query_groups": 4})
    config = OptimizerConfig(lr=1e-2, use_distributed_optimizer=options.get("distributed", False))
    model = ModelConfig(architecture=shape, dtype=options.get("dtype", "float32"))
    return build(parallel, context, shape, model, optimizer=config)


def _course(policy: Policy, optimizer: PolicyOptimizer, num_steps: int) -> Course:
    batch = training_batch()
    # Tokens all over the vocabulary, so that rows of every shard are learned.
    batch = replace(batch, tokens=batch.tokens * 25, labels=batch.labels * 25)
    course = []
    for _ in range(num_steps):
        outcome = forward_backward(policy, optimizer, PLAN, batch)
        optimizer.step()
        policy.sync_parameters()
        course.append((outcome.loss, outcome.grad_norm))
    return course
