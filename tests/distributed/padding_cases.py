"""Megatron pads the vocabulary: 41 tokens fill a part of a shard, or leave whole ones empty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from model_cases import VOCAB_SIZE, architecture, build, training_batch
from score_cases import TEMPERATURE, largest

from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.pipeline import run_batch
from nested_reft_mcore.mcore.weights import named_parameters


@dataclass(frozen=True)
class PaddedVocabulary:
    """What one process found."""

    num_padded_rows: int
    """Of one matrix, on this process."""
    padded_gradient: float
    """Largest gradient of a padded row."""
    real_gradient: float
    """Largest gradient of a real row; 0 where there is none here."""


def padded_vocabulary(
    parallel: ParallelConfig, context: ParallelContext
) -> dict[str, PaddedVocabulary]:
    """Tied and untied, with padded rows that would win if anybody looked at them."""
    found = {}
    for name, untied in (("tied", False), ("untied", True)):
        shape = architecture(untie_embeddings_and_output_weights=untied)
        policy, optimizer = build(parallel, context, shape)
        _fill_padding(policy, 3.0)
        optimizer.zero_grad()
        run_batch(policy, training_batch(), _loss, micro_batch_size=4, temperature=TEMPERATURE)
        matrices = list(_matrices(policy))
        assert len(matrices) == 1 + untied
        real = _num_real_rows(policy, matrices[0])
        gradients = [matrix.main_grad for matrix in matrices]  # type: ignore[attr-defined]
        assert all(gradient.isfinite().all() for gradient in gradients)
        found[name] = PaddedVocabulary(
            num_padded_rows=matrices[0].shape[0] - real,
            padded_gradient=max(largest(gradient[real:]) for gradient in gradients),
            real_gradient=min(largest(gradient[:real]) for gradient in gradients),
        )
    return found


def _loss(
    logprobs: torch.Tensor, entropies: torch.Tensor, batch: object
) -> tuple[torch.Tensor, torch.Tensor, None]:
    return (logprobs + 0.3 * entropies).sum(), torch.tensor(logprobs.numel()), None


def _matrices(policy: Policy) -> list[torch.Tensor]:
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    return [parameter for name, parameter in named_parameters(policy) if name in names]


def _num_real_rows(policy: Policy, matrix: torch.Tensor) -> int:
    start = policy.context.tensor.rank * matrix.shape[0]
    return max(0, min(VOCAB_SIZE - start, matrix.shape[0]))


def _fill_padding(policy: Policy, value: float) -> None:
    with torch.no_grad():
        for matrix in _matrices(policy):
            matrix[_num_real_rows(policy, matrix) :] = value
