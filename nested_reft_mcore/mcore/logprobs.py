"""Log-probabilities and entropies from hidden states, with no whole row of logits ever kept.

The output matrix is split over the vocabulary. Positions are taken in chunks: a chunk's logits are
made, reduced to three numbers a position, and forgotten; the backward pass makes them again. So no
`[positions, vocab]` tensor exists on any rank, at the price of one more matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from nested_reft_mcore.launch.context import ParallelDimension

_CHUNK_BYTES = 2**27
"""Room for a chunk's logits in float32, where the number of positions is left open."""


def token_logprobs(
    hidden: Float[Tensor, "local_seq batch hidden"],
    weight: Float[Tensor, "shard hidden"],
    labels: Int64[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | None = None,
    *,
    temperature: float,
    vocab_size: int,
    tensor: ParallelDimension,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """Log-probability of each label, and entropy of its whole distribution, at `temperature`.

    Nobody gathers the vocabulary. Ids from `vocab_size` on are Megatron's padding: they have
    probability exactly zero and get no gradient. Where no gradient comes in, none goes out and the
    hidden state is not looked at, even if it is NaN. The entropy's gradient costs nothing where
    the loss does not use the entropy.

    Args:
        hidden: What the last layer and the final norm gave, in the type of `weight`; with
            `sequence_parallel` this rank's part of the sequence, else all of it.
        weight: `[padded_vocab / tensor.size, hidden]`, this rank's shard of the output matrix.
        labels: Global token ids.
        mask: Positions that are wanted; left out: all. Other positions cost nothing.
        temperature: Divides the logits.
        vocab_size: Real vocabulary.
        tensor: The tensor-parallel dimension.
        sequence_parallel: Whether `hidden` is spread over `tensor`.
        chunk_tokens: Positions whose logits exist at the same time; left out: as many as make
            128 MiB of float32 on this rank.

    Returns:
        Log-probabilities and entropies in nats, both `[batch, seq]` and float32 (float64 for
        float64); 0 where `mask` is false.
    """
    if tensor.group is not None:
        # Each rank's gradient is that of its shard; the backward pass of these adds them up.
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tensor.group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tensor.group)
    start = tensor.rank * weight.shape[0]
    num_real = max(0, min(vocab_size - start, weight.shape[0]))
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    by_sequence = labels.t()
    if mask is None:
        mask = torch.ones_like(labels, dtype=torch.bool)
    wanted = mask.t().reshape(-1).nonzero()[:, 0]
    scores = _TokenScores.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        by_sequence.reshape(-1)[wanted] - start,
        wanted,
        _Options(temperature, num_real, chunk_tokens, tensor.group),
    )
    spread = [column.view(by_sequence.shape).t() for column in scores]
    return spread[0], spread[1]


@dataclass(frozen=True)
class _Options:
    """What is no tensor."""

    temperature: float
    num_real: int
    """Rows of the shard that are tokens, not padding."""
    chunk_tokens: int
    group: dist.ProcessGroup | None


class _TokenScores(torch.autograd.Function):
    """log softmax(hidden @ weight.T / T)[label] and entropy, keeping three numbers a position.

    Of `labels`, given as places in this rank's shard, those outside it belong to other ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, largest, mass = _forward(hidden, weight, labels, wanted, options)
        ctx.save_for_backward(hidden, weight, labels, wanted, largest, mass, entropies)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _spread(logprobs, wanted, len(hidden)), _spread(entropies, wanted, len(hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, wanted, largest, mass, entropies = ctx.saved_tensors
        per_logprob, per_entropy = (None if g is None else g[wanted] for g in gradients)
        if per_entropy is not None and not per_entropy.any():
            per_entropy = None
        if per_logprob is None:
            per_logprob = torch.zeros_like(mass)
        # Positions that nothing is asked of are left out, whatever they hold.
        asked = per_logprob != 0 if per_entropy is None else (per_logprob != 0) | (per_entropy != 0)
        chosen = asked.nonzero()[:, 0]
        grad_hidden, grad_weight = _backward(
            hidden,
            weight,
            labels[chosen],
            wanted[chosen],
            largest[chosen],
            mass[chosen],
            None if per_entropy is None else entropies[chosen],
            per_logprob[chosen],
            None if per_entropy is None else per_entropy[chosen],
            ctx.options,
        )
        return grad_hidden, grad_weight, None, None, None


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, the largest logit m and the sum of exp(z - m), `[wanted]` each."""
    largest, mass, weighted, label_logit = _shard_sums(hidden, weight, labels, wanted, options)
    if options.group is not None and len(wanted) > 0:
        local = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=options.group)
        # A shard of padding alone has no mass and no largest logit.
        shift = torch.where(mass == 0, 0.0, local - largest)
        scale = shift.exp()
        sums = torch.stack([scale * mass, scale * (weighted + shift * mass), label_logit])
        dist.all_reduce(sums, group=options.group)
        mass, weighted, label_logit = sums
    log_mass = mass.log()
    return (label_logit - largest) - log_mass, log_mass - weighted / mass, largest, mass


def _shard_sums(
    hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What this shard adds, `[wanted]` each: its largest logit m, the sums of exp(z - m) and of
    exp(z - m) * (z - m), and the label's logit, 0 where the label is elsewhere."""
    kind = {"dtype": _score_type(hidden), "device": hidden.device}
    largest = torch.full((len(wanted),), -torch.inf, **kind)
    mass, weighted, label_logit = torch.zeros(3, len(wanted), **kind)
    masses = None
    for place, logits, _rows in _chunks(hidden, weight, wanted, options):
        is_local, local = _locate(labels[place], options.num_real)
        found = logits.gather(-1, local).squeeze(-1)
        label_logit[place] = torch.where(is_local, found, 0.0)
        torch.amax(logits, dim=-1, out=largest[place])
        logits -= largest[place].unsqueeze(-1)
        masses = torch.empty_like(logits) if masses is None else masses[: len(logits)]
        torch.exp(logits, out=masses)
        mass[place] = masses.sum(dim=-1)
        weighted[place] = masses.mul_(logits).sum(dim=-1)
    return largest, mass, weighted, label_logit


def _backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chosen: Tensor,
    largest: Tensor,
    mass: Tensor,
    entropies: Tensor | None,
    per_logprob: Tensor,
    per_entropy: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and weights from those of the `chosen` positions' scores."""
    num_real = options.num_real
    grad_hidden = torch.zeros_like(hidden)
    # Chunks add up in float32 at least, and are rounded to the type of the weights once.
    grad_weight = torch.zeros_like(weight, dtype=_score_type(weight))
    per_logprob = per_logprob.div(options.temperature).unsqueeze(-1)
    largest, scale = largest.unsqueeze(-1), mass.reciprocal().unsqueeze(-1)
    if per_entropy is not None and entropies is not None:
        # log p_i + entropy = (z_i - m) + offset
        offset = (entropies - mass.log()).unsqueeze(-1)
        per_entropy = per_entropy.div(options.temperature).unsqueeze(-1)
    masses = None
    for place, logits, rows in _chunks(hidden, weight, chosen, options):
        is_local, local = _locate(labels[place], num_real)
        logits -= largest[place]
        down = per_logprob[place]
        if per_entropy is None:
            # d logprob / d z_i = 1[i = label] - p_i
            gradient = logits.exp_().mul_(-down * scale[place])
        else:
            # d entropy / d z_i = -p_i (log p_i + entropy)
            masses = torch.empty_like(logits) if masses is None else masses[: len(logits)]
            torch.exp(logits, out=masses)
            gradient = logits.add_(offset[place]).mul_(-per_entropy[place]).sub_(down)
            gradient.mul_(masses.mul_(scale[place]))
        gradient.scatter_add_(-1, local, torch.where(is_local.unsqueeze(-1), down, 0.0))
        gradient = gradient.to(weight.dtype)
        grad_hidden[chosen[place]] = gradient @ weight[:num_real]
        if grad_weight.dtype == weight.dtype:
            grad_weight[:num_real].addmm_(gradient.t(), rows)
        else:
            grad_weight[:num_real] += gradient.t() @ rows
    return grad_hidden, grad_weight.to(weight.dtype)


def _chunks(
    hidden: Tensor, weight: Tensor, chosen: Tensor, options: _Options
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which of `chosen` a chunk holds, its logits at the temperature, and its hidden states.

    The logits lie in one buffer, which the next chunk overwrites.
    """
    if options.num_real == 0:
        return
    tokens = weight[: options.num_real]
    size = min(options.chunk_tokens, len(chosen))
    buffer = hidden.new_empty(size, options.num_real)
    for start in range(0, len(chosen), size or 1):
        place = slice(start, min(start + size, len(chosen)))
        rows = hidden[chosen[place]]
        logits = torch.mm(rows, tokens.t(), out=buffer[: len(rows)]).to(_score_type(hidden))
        if options.temperature != 1:
            logits /= options.temperature
        yield place, logits, rows


def _locate(labels: Tensor, num_real: int) -> tuple[Tensor, Tensor]:
    """Whether each label is in this shard, `[chunk]`, and its place, `[chunk, 1]`, or 0."""
    is_local = (labels >= 0) & (labels < num_real)
    return is_local, torch.where(is_local, labels, 0).unsqueeze(-1)


def _spread(values: Tensor, wanted: Tensor, length: int) -> Tensor:
    """`values` at the places `wanted` of a tensor of zeros."""
    return values.new_zeros(length).index_copy_(0, wanted, values)


def _score_type(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
