"""Log-probs and entropies from shards of the output matrix, beside float64 autograd over all of it.

Nothing here builds a model: hidden states and the matrix are drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nested_reft_mcore.hf.transforms import padded_vocab_size
from nested_reft_mcore.launch.context import ParallelDimension
from nested_reft_mcore.mcore.logprobs import token_logprobs

TEMPERATURE, SEQ, BATCH, HIDDEN = 0.7, 12, 3, 16
VOCABULARIES = (41, 300)
"""Padded to 128 a rank: of four shards one is in use in part; or three, and none of the fourth."""


def compare_scores(tensor: ParallelDimension) -> dict[str, dict[str, float]]:
    """Errors by case, relative to the largest value of what is compared."""
    found = {}
    for vocab_size in VOCABULARIES:
        for name, options in _variants(tensor).items():
            found[f"{vocab_size}/{name}"] = _errors(vocab_size, tensor, **options)
    return found


def _variants(tensor: ParallelDimension) -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {
        "one chunk": {},
        "chunks of 5": {"chunk_tokens": 5},
        "chunks of 1": {"chunk_tokens": 1},
        "masked": {"chunk_tokens": 4, "is_masked": True},
        "NaN without gradient": {"chunk_tokens": 4, "is_masked": True, "mask_is_told": False},
        "nothing wanted": {"is_masked": True, "num_wanted": 0},
        "without entropy": {"chunk_tokens": 5, "entropy_weight": None},
        "entropy of no weight": {"chunk_tokens": 5, "entropy_weight": 0.0},
    }
    if tensor.size > 1:
        variants["sequence parallel"] = {"chunk_tokens": 5, "sequence_parallel": True}
    return variants


def drawn(vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, matrix without padding, labels, and the weights of a loss, all float32."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(SEQ, BATCH, HIDDEN, generator=generator)
    matrix = torch.randn(vocab_size, HIDDEN, generator=generator)
    labels = torch.randint(0, vocab_size, (BATCH, SEQ), generator=generator)
    # The first and the last token of every shard, of which padding begins behind the very last.
    starts = range(0, vocab_size, 128)
    borders = [*starts, *(start - 1 for start in starts[1:]), vocab_size - 1]
    labels[0, : len(borders)] = torch.tensor(borders)
    return hidden, matrix, labels, torch.randn(2, BATCH, SEQ, generator=generator)


def naive(hidden: Tensor, matrix: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same from whole logits."""
    rows = ((hidden @ matrix.t()).transpose(0, 1) / TEMPERATURE).log_softmax(-1)
    logprobs = rows.gather(-1, labels[..., None])[..., 0]
    return logprobs, -(rows.exp() * rows).sum(-1)


def _exact(
    hidden: Tensor,
    matrix: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: tuple[Tensor, Tensor],
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Scores at the places of the mask in float64, and the gradients of their weighted sum."""
    hidden, matrix = hidden.double().requires_grad_(), matrix.double().requires_grad_()
    scores = [torch.where(mask, values, 0.0) for values in naive(hidden, matrix, labels)]
    loss = (weights[0] * scores[0] + weights[1] * scores[1]).sum()
    grad_hidden, grad_matrix = torch.autograd.grad(loss, (hidden, matrix))
    return [values.detach() for values in scores], (grad_hidden, grad_matrix)


def _shards(
    hidden: Tensor, matrix: Tensor, mask: Tensor, tensor: ParallelDimension, sequence_parallel: bool
) -> tuple[Tensor, Tensor]:
    """This rank's hidden states and matrix: what is not wanted, and rows of padding, hold NaN."""
    broken = torch.where(mask.t()[..., None], hidden, torch.nan)
    padded = torch.full((padded_vocab_size(len(matrix), tensor.size), HIDDEN), torch.nan)
    padded[: len(matrix)] = matrix
    given = broken.chunk(tensor.size)[tensor.rank] if sequence_parallel else broken
    weight = padded.chunk(tensor.size)[tensor.rank]
    return given.clone().requires_grad_(), weight.clone().requires_grad_()


def _errors(
    vocab_size: int,
    tensor: ParallelDimension,
    *,
    chunk_tokens: int | None = None,
    is_masked: bool = False,
    num_wanted: int = 17,
    mask_is_told: bool = True,
    entropy_weight: float | None = 1.0,
    sequence_parallel: bool = False,
) -> dict[str, float]:
    hidden, matrix, labels, (per_logprob, per_entropy) = drawn(vocab_size)
    mask = torch.ones(BATCH, SEQ, dtype=torch.bool)
    if is_masked:
        order = torch.randperm(BATCH * SEQ, generator=torch.Generator().manual_seed(0))
        mask = (order < num_wanted).view(BATCH, SEQ)
    per_entropy = per_entropy * (entropy_weight or 0.0)
    expected, (grad_hidden, grad_weight) = _exact(
        hidden, matrix, labels, mask, (per_logprob, per_entropy)
    )

    given, weight = _shards(hidden, matrix, mask, tensor, sequence_parallel)
    logprobs, entropies = token_logprobs(
        given,
        weight,
        labels,
        mask if is_masked and mask_is_told else None,
        temperature=TEMPERATURE,
        vocab_size=vocab_size,
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
    )
    if not mask_is_told:
        assert logprobs[~mask].isnan().all()
        logprobs, entropies = (torch.where(mask, v, 0.0) for v in (logprobs, entropies))
    loss = (per_logprob * logprobs).sum()
    if entropy_weight is not None:
        loss = loss + (per_entropy * entropies).sum()
    loss.backward()
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert given.grad is not None
    assert weight.grad is not None
    if sequence_parallel:
        grad_hidden = grad_hidden.chunk(tensor.size)[tensor.rank]
    whole = grad_weight.new_zeros(len(weight) * tensor.size, HIDDEN)
    whole[:vocab_size] = grad_weight
    real = max(0, min(vocab_size - tensor.rank * len(weight), len(weight)))
    scale = float(grad_weight.abs().max())
    return {
        "logprobs": largest(logprobs.detach() - expected[0]),
        "entropies": largest(entropies.detach() - expected[1]),
        "hidden gradient": _relative(given.grad - grad_hidden, grad_hidden),
        "weight gradient": largest(weight.grad - whole.chunk(tensor.size)[tensor.rank])
        / (scale or 1.0),
        "padded gradient": largest(weight.grad[real:]),
        "unwanted gradient": largest(given.grad[~mask.t()]) if not sequence_parallel else 0.0,
        "mass": _mass_error(hidden, weight.detach(), vocab_size, tensor),
        "gradient is there": float(bool(given.grad.any())),
    }


def _mass_error(
    hidden: Tensor, weight: Tensor, vocab_size: int, tensor: ParallelDimension
) -> float:
    """How far from 1 the probabilities of all tokens at one position add up."""
    same = hidden[:1, :1].expand(vocab_size, 1, -1)
    labels = torch.arange(vocab_size)[None]
    logprobs, _ = token_logprobs(
        same, weight, labels, temperature=TEMPERATURE, vocab_size=vocab_size, tensor=tensor
    )
    return abs(float(logprobs.double().exp().sum()) - 1)


def _relative(error: Tensor, expected: Tensor) -> float:
    return largest(error) / (largest(expected) or 1.0)


def largest(values: Tensor) -> float:
    """Largest magnitude; NaN where there is one."""
    return float(values.abs().max()) if values.numel() else 0.0
