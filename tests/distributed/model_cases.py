"""A tiny model, a batch, and what both give: the ground that every layout is compared on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.architecture import ModelArchitecture, RopeScaling
from nested_reft_mcore.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.pipeline import PassResult, broadcast_object, run_batch
from nested_reft_mcore.mcore.weights import initialize_weights, named_parameters
from nested_reft_mcore.rollout.batch import TrainingBatch

NUM_LAYERS = 8
VOCAB_SIZE = 41


def architecture(**changes: Any) -> ModelArchitecture:
    """Eight layers, grouped queries, QKV bias, heads wider than hidden / heads, 41 tokens."""
    shape = {
        "num_layers": NUM_LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 12,
        "ffn_hidden_size": 48,
        "vocab_size": VOCAB_SIZE,
        "add_qkv_bias": True,
        # Large enough that every layer matters.
        "init_method_std": 0.15,
    }
    return ModelArchitecture(**{**shape, **changes})


def shapes() -> dict[str, ModelArchitecture]:
    """Tied embeddings of 41 tokens, all on the first tensor rank, and a QKV bias; untied ones of
    200, on both, norms over queries and keys, and Llama 3.1's rotary frequencies."""
    scaling = RopeScaling(
        factor=4.0, low_freq_factor=1.25, high_freq_factor=5.0, original_max_position_embeddings=48
    )
    return {
        "tied": architecture(),
        "untied": architecture(
            vocab_size=200,
            untie_embeddings_and_output_weights=True,
            add_qkv_bias=False,
            qk_layernorm=True,
            rope_scaling=scaling,
        ),
    }


def training_batch(num_sequences: int = 8, length: int = 12) -> TrainingBatch:
    """Random sequences with ragged prompts and responses; advantages of very different sizes."""
    generator = torch.Generator().manual_seed(5)
    sequences = torch.randint(0, VOCAB_SIZE, (num_sequences, length + 1), generator=generator)
    starts = torch.randint(2, 6, (num_sequences, 1), generator=generator)
    ends = torch.randint(7, length + 1, (num_sequences, 1), generator=generator)
    places = torch.arange(length).repeat(num_sequences, 1)
    return TrainingBatch(
        tokens=sequences[:, :-1],
        labels=sequences[:, 1:],
        position_ids=places,
        response_mask=(places >= starts) & (places < ends),
        behavior_logprobs=torch.zeros(num_sequences, length),
        advantages=torch.tensor(
            [10.0 ** (row % 3 - 1) * (-1) ** row for row in range(num_sequences)]
        ),
    )


def weighted_loss(
    logprobs: Tensor, entropies: Tensor, batch: TrainingBatch
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Advantage-weighted log-probabilities plus an entropy term: every gradient path is used."""
    values = batch.advantages[:, None] * logprobs + 0.3 * entropies
    loss = -torch.where(batch.response_mask, values, 0.0).sum()
    return loss, batch.response_mask.sum(), {"loss": loss.detach()}


def build(
    parallel: ParallelConfig,
    context: ParallelContext,
    shape: ModelArchitecture | None = None,
    model: ModelConfig | None = None,
    *,
    optimizer: OptimizerConfig | None = None,
) -> tuple[Policy, PolicyOptimizer]:
    """A policy with seeded weights, wrapped for training."""
    shape = shape or architecture()
    policy = build_policy(shape, model or ModelConfig(architecture=shape), parallel, context)
    initialize_weights(policy, seed=3)
    randomize_norms_and_biases(policy)
    return policy, PolicyOptimizer(policy, optimizer or OptimizerConfig(lr=1e-3), num_steps=10)


def randomize_norms_and_biases(policy: Policy) -> None:
    """Give norms and biases values of their own, so that mixing them up shows.

    A shard of a bias takes its slice of the whole; copies hold the same.
    """
    for name, parameter in named_parameters(policy):
        if "norm" not in name and not name.endswith("bias"):
            continue
        size = policy.context.tensor.size if name.endswith("bias") else 1
        generator = torch.Generator().manual_seed(sum(name.encode()))
        whole = 1 + 0.2 * torch.randn(parameter.shape[0] * size, generator=generator)
        with torch.no_grad():
            parameter.copy_(whole.chunk(size)[policy.context.tensor.rank if size > 1 else 0])


@dataclass(frozen=True)
class Outcome:
    """A pass forward and backward: global numbers, and this rank's gradients by global name."""

    result: PassResult
    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]


def forward_backward(
    policy: Policy, optimizer: PolicyOptimizer, plan: LayerSkipPlan, batch: TrainingBatch
) -> Outcome:
    """Gradients of the weighted loss under `plan`, averaged over the global token count."""
    data = policy.context.data
    share = batch.split(data.size)[data.rank]
    optimizer.zero_grad()
    with policy.nested(plan):
        result = run_batch(policy, share, weighted_loss, micro_batch_size=2, temperature=0.7)
    optimizer.megatron.prepare_grads()
    losses = [float(output["loss"]) for output in result.outputs]
    loss = torch.tensor(broadcast_object(sum(losses), policy.context), dtype=torch.float64)
    if data.group is not None:
        dist.all_reduce(loss, group=data.group)
    gradients = {
        name: parameter.main_grad.clone()  # type: ignore[attr-defined]
        for name, parameter in named_parameters(policy)
    }
    norm = float(optimizer.megatron.get_grad_norm())
    return Outcome(result, float(loss) / batch.num_response_tokens, norm, gradients)


def smaller_policy(policy: Policy, plan: LayerSkipPlan, parallel: ParallelConfig) -> Policy:
    """A model that physically lacks what `plan` skips, with the survivors' weights (1 process).

    A layer of which one part is skipped keeps that part's modules but has its output matrix zeroed,
    so that the part adds nothing to the residual stream; whole layers are not built at all.
    """
    keep = plan.active
    shape = policy.architecture.model_copy(update={"num_layers": len(keep)})
    small = build_policy(shape, ModelConfig(architecture=shape), parallel, policy.context)
    source = dict(named_parameters(policy))
    with torch.no_grad():
        for name, parameter in named_parameters(small):
            parameter.copy_(source[original_name(name, keep)])
        for layer in small.layers:
            if plan.skips_attention(keep[layer.global_index]):
                layer.self_attention.linear_proj.weight.zero_()
            if plan.skips_mlp(keep[layer.global_index]):
                layer.mlp.linear_fc2.weight.zero_()
    return small


def original_name(name: str, keep: tuple[int, ...]) -> str:
    """The name in the full model of a parameter of the smaller one."""
    parts = name.split(".")
    if "layers" in parts:
        place = parts.index("layers") + 1
        parts[place] = str(keep[int(parts[place])])
    return ".".join(parts)


def shard(whole: Tensor, name: str, parameter: Tensor, policy: Policy) -> Tensor:
    """This rank's part of a gradient or weight that one process holds whole."""
    size, rank = policy.context.tensor.size, policy.context.tensor.rank
    if "word_embeddings" in name or "output_layer" in name:
        padded = whole.new_zeros(parameter.shape[0] * size, whole.shape[1])
        vocab_size = policy.architecture.vocab_size
        padded[:vocab_size] = whole[:vocab_size]
        return padded.chunk(size)[rank]
    dimension = getattr(parameter, "partition_dim", -1)
    if dimension < 0:
        return whole
    if "linear_fc1" in name:
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size, dim=dimension)[rank]


def plans() -> Iterator[LayerSkipPlan]:
    """Nothing skipped; scattered layers; parts; whole stages of 2 and of 4; all but the borders."""
    texts = ("", "1,2,5", "1.attention,3.mlp,4,6.attention", "2,3", "2,3,4,5", "1,2,3,4,5,6")
    for text in texts:
        yield LayerSkipPlan.parse(text, NUM_LAYERS) if text else LayerSkipPlan.full(NUM_LAYERS)
