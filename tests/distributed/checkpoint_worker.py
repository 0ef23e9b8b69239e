"""Processes that save a checkpoint in one layout, or load it in another and go on training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_cases import Outcome, build, forward_backward, shard, training_batch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import OptimizerConfig, ParallelConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.checkpoint import load_checkpoint, save_checkpoint
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import initialize_weights, named_parameters

PLAN = LayerSkipPlan.full(8)


def _step(policy: Policy, optimizer: PolicyOptimizer) -> Outcome:
    outcome = forward_backward(policy, optimizer, PLAN, training_batch())
    optimizer.step()
    policy.sync_parameters()
    return outcome


def save(
    ranks: RankInfo, options: dict[str, Any], optimizer_options: dict[str, Any], root: Path
) -> None:
    """Two steps, save, a third step whose result lands beside the checkpoint."""
    parallel = ParallelConfig(**options)
    context = initialize_parallel(parallel, ranks, seed=0)
    config = OptimizerConfig(lr=1e-2, lr_warmup_steps=2, **optimizer_options)
    policy, optimizer = build(parallel, context, optimizer=config)
    for _ in range(2):
        _step(policy, optimizer)
    save_checkpoint(root, 2, policy, optimizer, {"note": "kept"}, keep=1)
    outcome = _step(policy, optimizer)
    after = {name: parameter.detach().clone() for name, parameter in named_parameters(policy)}
    if context.world_size == 1:
        torch.save({"loss": outcome.loss, "weights": after}, root / "third_step.pt")
    shutdown()


def load(
    ranks: RankInfo, options: dict[str, Any], optimizer_options: dict[str, Any], root: Path
) -> float:
    """Load into a fresh policy, take the third step; returns the largest mean difference."""
    parallel = ParallelConfig(**options)
    context = initialize_parallel(parallel, ranks, seed=0)
    config = OptimizerConfig(lr=1e-2, lr_warmup_steps=2, **optimizer_options)
    policy, optimizer = build(parallel, context, optimizer=config)
    initialize_weights(policy, seed=99)
    state = load_checkpoint(policy, optimizer, root)
    assert state == {"step": 2, "note": "kept"}
    outcome = _step(policy, optimizer)
    expected = torch.load(root / "third_step.pt", weights_only=True)
    torch.testing.assert_close(outcome.loss, expected["loss"], rtol=1e-5, atol=0)
    differences = []
    for name, parameter in named_parameters(policy):
        key = name if name in expected["weights"] else "embedding.word_embeddings.weight"
        whole = shard(expected["weights"][key], name, parameter, policy)
        differences.append(float((parameter.detach() - whole).abs().mean()))
    shutdown()
    return max(differences)
