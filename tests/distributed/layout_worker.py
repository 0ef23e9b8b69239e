"""One process of a layout: compares itself with what a single process wrote down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from model_cases import (
    Outcome,
    build,
    forward_backward,
    original_name,
    plans,
    shapes,
    shard,
    smaller_policy,
    training_batch,
)

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import check_tied_embeddings, named_parameters

RECOMPUTE = {
    "none": {},
    "uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
}

HARD_PLANS = ("1.attention,3.mlp,4,6.attention", "2,3,4,5")
"""Scattered parts; and layers that are whole middle stages of four, halves of two."""


def write_reference(parallel: ParallelConfig, context: ParallelContext, path: Path) -> None:
    """Losses, norms, log-probs and gradients of models that lack the skipped layers."""
    reference: dict[str, Any] = {}
    for shape_name, shape in shapes().items():
        policy, _ = build(parallel, context, shape)
        for plan in plans():
            small = smaller_policy(policy, plan, parallel)
            optimizer = PolicyOptimizer(small, OptimizerConfig(lr=1e-3), num_steps=10)
            outcome = forward_backward(
                small, optimizer, LayerSkipPlan.full(len(plan.active)), training_batch()
            )
            reference[f"{shape_name}/{plan.describe()}"] = {
                "loss": outcome.loss,
                "grad_norm": norm_without(outcome, plan),
                "logprobs": outcome.result.logprobs,
                "entropies": outcome.result.entropies,
                "gradients": {
                    original_name(name, plan.active): gradient
                    for name, gradient in outcome.gradients.items()
                },
            }
    torch.save(reference, path)


def norm_without(outcome: Outcome, plan: LayerSkipPlan) -> float:
    """Gradient norm of a smaller model, the parts that `plan` skips left out."""
    total = sum(
        float(gradient.double().pow(2).sum())
        for name, gradient in outcome.gradients.items()
        if not is_skipped(original_name(name, plan.active), plan)
    )
    return total**0.5


def is_skipped(name: str, plan: LayerSkipPlan) -> bool:
    """Whether a parameter belongs to a skipped part."""
    parts = name.split(".")
    if "layers" not in parts:
        return False
    layer = int(parts[parts.index("layers") + 1])
    is_mlp = "mlp" in parts[parts.index("layers") + 2]
    return plan.skips_mlp(layer) if is_mlp else plan.skips_attention(layer)


def compare(
    outcome: Outcome, expected: dict[str, Any], policy: Policy, plan: LayerSkipPlan
) -> None:
    """Raise unless this layout computes what the smaller model did."""
    data = policy.context.data
    rows = slice(data.rank * 8 // data.size, (data.rank + 1) * 8 // data.size)
    close = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(outcome.result.logprobs, expected["logprobs"][rows], **close)
    torch.testing.assert_close(outcome.result.entropies, expected["entropies"][rows], **close)
    torch.testing.assert_close(outcome.loss, expected["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(outcome.grad_norm, expected["grad_norm"], rtol=1e-5, atol=0)
    scale = expected["grad_norm"]
    for name, parameter in named_parameters(policy):
        gradient = outcome.gradients[name]
        if is_skipped(name, plan):
            assert not gradient.any(), f"{name} is skipped under {plan.describe()} but has gradient"
            continue
        is_padding = name.startswith(("embedding", "output_layer"))
        assert is_padding or gradient.any(), (
            f"{name} runs under {plan.describe()} but has no gradient"
        )
        key = name if name in expected["gradients"] else "embedding.word_embeddings.weight"
        whole = expected["gradients"][key]
        torch.testing.assert_close(
            gradient, shard(whole, name, parameter, policy), rtol=1e-4, atol=1e-6 * scale
        )


def cases() -> Iterator[tuple[str, dict[str, Any], list[LayerSkipPlan]]]:
    """Shape, recomputation and plans: every plan once, and where it matters the hard ones again."""
    every = list(plans())
    hard = [plan for plan in every if plan.describe() in HARD_PLANS]
    assert len(hard) == len(HARD_PLANS)
    yield "tied", RECOMPUTE["none"], every
    yield "tied", RECOMPUTE["uniform"], hard
    yield "tied", RECOMPUTE["block"], hard
    yield "untied", RECOMPUTE["none"], hard


def check_layout(parallel: ParallelConfig, context: ParallelContext, path: Path) -> None:
    """Compare every case with the reference."""
    reference = torch.load(path, weights_only=True)
    for shape_name, recompute, case_plans in cases():
        shape = shapes()[shape_name]
        model = ModelConfig(architecture=shape, **recompute)
        policy, optimizer = build(parallel, context, shape, model)
        assert check_tied_embeddings(policy)
        for plan in case_plans:
            outcome = forward_backward(policy, optimizer, plan, training_batch())
            assert not policy.plan.skipped, "the context did not restore full depth"
            compare(outcome, reference[f"{shape_name}/{plan.describe()}"], policy, plan)
        optimizer.step()
        assert check_tied_embeddings(policy), "the copies of the embedding drifted apart"


def run_layouts(
    ranks: RankInfo, layouts: dict[str, dict[str, Any]], path: Path, *, write: bool = False
) -> None:
    """One process: build one layout after the other and compare it with the file at `path`."""
    for name, options in layouts.items():
        parallel = ParallelConfig(**options)
        context = initialize_parallel(parallel, ranks, seed=0)
        if write:
            write_reference(parallel, context, path)
        try:
            check_layout(parallel, context, path)
        except AssertionError as error:
            raise AssertionError(f"layout {name}") from error
        parallel_state.destroy_model_parallel()
    shutdown()
