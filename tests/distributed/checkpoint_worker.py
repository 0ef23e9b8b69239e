"""Processes that save a checkpoint in one layout, or load it in another and go on training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_cases import Outcome, build, forward_backward, shapes, shard, training_batch
from update_cases import layout

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import OptimizerConfig, ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.checkpoint import load_checkpoint, save_weights
from nested_reft_mcore.mcore.initialize import shutdown
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import initialize_weights, named_parameters

PLAN = LayerSkipPlan.full(8)


def _step(policy: Policy, optimizer: PolicyOptimizer) -> Outcome:
    outcome = forward_backward(policy, optimizer, PLAN, training_batch())
    optimizer.step()
    policy.sync_parameters()
    return outcome


Case = tuple[str, dict[str, Any]]
"""A name in `model_cases.shapes`, and options of the optimizer."""


def save(ranks: RankInfo, cases: dict[str, Case], root: Path) -> None:
    """For each case two steps, save, and a third step that is recorded beside it."""
    with layout(ranks, {}) as (parallel, context):
        for name, case in cases.items():
            policy, optimizer = _start(parallel, context, case)
            for _ in range(2):
                _step(policy, optimizer)
            state = {"step": 2, "note": "kept"}
            save_weights(policy, root / name / "saved", optimizer=optimizer, state=state)
            outcome = _step(policy, optimizer)
            after = {n: p.detach().clone() for n, p in named_parameters(policy)}
            torch.save({"loss": outcome.loss, "weights": after}, root / name / "third_step.pt")
    shutdown()


def load(
    ranks: RankInfo,
    layouts: dict[str, dict[str, Any]],
    cases: dict[str, Case],
    root: Path,
) -> dict[str, float]:
    """Load into fresh policies and take the third step; largest mean differences of a weight."""
    differences = {}
    for layout_name, layout_options in layouts.items():
        with layout(ranks, layout_options) as (parallel, context):
            for name, case in cases.items():
                policy, optimizer = _start(parallel, context, case)
                initialize_weights(policy, seed=99)
                state = load_checkpoint(policy, optimizer, root / name / "saved")
                assert state == {"step": 2, "note": "kept"}
                differences[f"{layout_name}, {name}"] = _third_step(
                    policy, optimizer, root / name / "third_step.pt"
                )
    shutdown()
    return differences


def _start(
    parallel: ParallelConfig, context: ParallelContext, case: Case
) -> tuple[Policy, PolicyOptimizer]:
    shape, options = case
    config = OptimizerConfig(lr=1e-2, lr_warmup_steps=2, **options)
    return build(parallel, context, shapes()[shape], optimizer=config)


def _third_step(policy: Policy, optimizer: PolicyOptimizer, path: Path) -> float:
    outcome = _step(policy, optimizer)
    expected = torch.load(path, weights_only=True)
    torch.testing.assert_close(outcome.loss, expected["loss"], rtol=1e-5, atol=0)
    differences = []
    for name, parameter in named_parameters(policy):
        key = name if name in expected["weights"] else "embedding.word_embeddings.weight"
        whole = shard(expected["weights"][key], name, parameter, policy)
        differences.append(float((parameter.detach() - whole).abs().mean()))
    return max(differences)
