"""Fresh weights, the same for every parallel layout."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from nested_reft_mcore.mcore.model import Policy

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")


def named_parameters(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """This process's parameters under names with global layer numbers."""
    for chunk in policy.chunks:
        for name, parameter in chunk.named_parameters():
            match = _LAYER.search(name)
            if match:
                index = chunk.decoder.layers[int(match.group())].global_index
                name = f"{name[: match.start()]}{index}{name[match.end() :]}"
            yield name, parameter


def initialize_weights(policy: Policy, seed: int) -> None:
    """Fill every parameter from its name, full shape and `seed`.

    Matrices are normal with `init_method_std`, the outputs of attention and MLP with that over
    sqrt(2 * num_layers) (GPT-2), the embedding with `embedding_init_method_std` if there is one;
    norms are one and biases zero. Each process draws the full matrix
    and keeps its slice, so that every layout starts from the same model.
    """
    tied = not policy.architecture.untie_embeddings_and_output_weights
    with torch.no_grad():
        for name, parameter in named_parameters(policy):
            if name == "output_layer.weight" and tied:
                name = "embedding.word_embeddings.weight"
            parameter.copy_(_local_values(policy, name, parameter, seed))


def _local_values(policy: Policy, name: str, parameter: Tensor, seed: int) -> Tensor:
    if "norm" in name:
        return torch.ones(parameter.shape)
    if name.endswith("bias"):
        return torch.zeros(parameter.shape)
    rank, size = policy.context.tensor.rank, policy.context.tensor.size
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    std = policy.architecture.init_method_std
    if "word_embeddings" in name:
        std = policy.architecture.embedding_init_method_std or std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= (2 * policy.architecture.num_layers) ** 0.5

    def full(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    if "word_embeddings" in name or "output_layer" in name:
        values = torch.zeros(policy.padded_vocab_size, parameter.shape[1])
        values[: policy.architecture.vocab_size] = full(
            policy.architecture.vocab_size, parameter.shape[1]
        )
        return values.chunk(size)[rank]
    if "linear_fc1" in name:
        gate, up = full(2, parameter.shape[0] // 2 * size, parameter.shape[1]).chunk(size, dim=1)[
            rank
        ]
        return torch.cat([gate, up])
    dimension = parameter.partition_dim  # type: ignore[attr-defined]
    shape = [
        extent * size if i == dimension else extent for i, extent in enumerate(parameter.shape)
    ]
    return full(*shape).chunk(size, dim=dimension)[rank]


def check_tied_embeddings(policy: Policy) -> bool:
    """Whether the copies of a tied embedding on the first and last stage hold the same bits."""
    pipeline = policy.context.pipeline
    if policy.architecture.untie_embeddings_and_output_weights or pipeline.group is None:
        return True
    copies = [
        parameter.detach()
        for name, parameter in named_parameters(policy)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight")
    ]
    sums = torch.zeros(2, dtype=torch.float64, device=policy.context.device)
    for copy in copies:
        sums[int(policy.context.is_last_stage)] = copy.double().abs().sum()
    dist.all_reduce(sums, group=pipeline.group)
    return bool(sums[0] == sums[1])
