"""Megatron pads the vocabulary: 41 tokens fill a part of a shard, or leave whole ones empty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from model_cases import VOCAB_SIZE, architecture, build, training_batch

from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, ParallelDimension
from nested_reft_mcore.mcore.logprobs import token_logprobs
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.pipeline import run_batch
from nested_reft_mcore.mcore.weights import named_parameters

TEMPERATURE = 0.7


@dataclass(frozen=True)
class PaddedVocabulary:
    """What one process found, errors as largest absolute differences."""

    num_padded_rows: int
    """Of one matrix, on this process."""
    padded_gradient: float
    """Largest gradient of a padded row."""
    real_gradient: float
    """Largest gradient of a real row; 0 where there is none here."""
    mass_error: float
    """Of the sum of the probabilities of the real tokens."""
    logprob_error: float
    """Against float64."""
    entropy_error: float
    """Against float64."""
    gradient_error: float
    """Of the gradient of the logits, against float64 autograd."""
    masked_gradient: float
    """Largest gradient of logits that are NaN where no gradient comes in."""


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
            padded_gradient=max(_largest(gradient[real:]) for gradient in gradients),
            real_gradient=min(_largest(gradient[:real]) for gradient in gradients),
            **compare_with_float64(context.tensor),
        )
    return found


def compare_with_float64(tensor: ParallelDimension) -> dict[str, float]:
    """`token_logprobs` over this rank's shard of logits, beside log_softmax over the real ones."""
    generator = torch.Generator().manual_seed(4)
    shape = (2, VOCAB_SIZE)
    real = 4 * torch.randn(*shape, VOCAB_SIZE, generator=generator)
    # Every token is a label once.
    labels = torch.arange(VOCAB_SIZE).repeat(2, 1)
    weights = torch.randn(2, *shape, generator=generator)
    exact = real.double().requires_grad_()
    rows = (exact / TEMPERATURE).log_softmax(-1)
    logprobs = rows.gather(-1, labels[..., None])[..., 0]
    entropies = -(rows.exp() * rows).sum(-1)
    (weights[0] * logprobs + weights[1] * entropies).sum().backward()

    padded = torch.full((*shape, 128 * tensor.size), 50.0)
    padded[..., :VOCAB_SIZE] = real
    shard = padded.chunk(tensor.size, dim=-1)[tensor.rank].clone().requires_grad_()

    def ours(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(
            logits, wanted, temperature=TEMPERATURE, vocab_size=VOCAB_SIZE, tensor=tensor
        )

    found, found_entropies = ours(shard, labels)
    (weights[0] * found + weights[1] * found_entropies).sum().backward()
    wanted = torch.zeros_like(padded)
    assert exact.grad is not None
    assert shard.grad is not None
    wanted[..., :VOCAB_SIZE] = exact.grad
    wanted = wanted.chunk(tensor.size, dim=-1)[tensor.rank]
    # One position, all labels: the whole distribution.
    same = padded[:1, :1].expand(1, VOCAB_SIZE, -1).chunk(tensor.size, dim=-1)[tensor.rank]
    distribution, _ = ours(same.contiguous(), labels[:1])
    return {
        "mass_error": abs(float(distribution.detach().double().exp().sum()) - 1),
        "logprob_error": _largest(found.detach() - logprobs.detach()),
        "entropy_error": _largest(found_entropies.detach() - entropies.detach()),
        "gradient_error": _largest(shard.grad - wanted),
        "masked_gradient": _masked_gradient(shard, labels, tensor),
    }


def _masked_gradient(shard: torch.Tensor, labels: torch.Tensor, tensor: ParallelDimension) -> float:
    """The first half of the positions holds NaN and counts for nothing."""
    half = labels.shape[1] // 2
    logits = shard.detach().clone()
    logits[:, :half] = torch.nan
    logits.requires_grad_()
    logprobs, entropies = token_logprobs(
        logits, labels, temperature=TEMPERATURE, vocab_size=VOCAB_SIZE, tensor=tensor
    )
    (logprobs[:, half:].sum() + entropies[:, half:].sum()).backward()
    assert logits.grad is not None
    assert tensor.rank > 0 or logits.grad[:, half:].any()
    return _largest(logits.grad[:, :half])


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


def _largest(values: torch.Tensor) -> float:
    """Largest magnitude; NaN where there is one."""
    return float(values.abs().max()) if values.numel() else 0.0
