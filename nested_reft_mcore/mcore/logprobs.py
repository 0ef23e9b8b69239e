"""Log-probabilities and entropies from logits that are split over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nested_reft_mcore.launch.context import ParallelDimension


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tensor: ParallelDimension,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy of its distribution, at `temperature`.

    Nobody gathers the vocabulary: each rank reduces its shard to three numbers a token. Ids from
    `vocab_size` on are Megatron's padding; they have probability exactly zero and get no gradient.
    Where no gradient comes in, none goes out, even if the logits hold NaN.

    Args:
        logits: `[batch, seq, padded_vocab / tensor.size]`, this rank's shard.
        labels: `[batch, seq]` int64, global token ids.
        temperature: Divides the logits.
        vocab_size: Real vocabulary.
        tensor: The tensor-parallel dimension.

    Returns:
        Log-probabilities and entropies, both `[batch, seq]` float32, in nats.
    """
    start = tensor.rank * logits.shape[-1]
    return _VocabParallelLogProb.apply(logits, labels, temperature, vocab_size, start, tensor.group)  # type: ignore[no-any-return]


class _VocabParallelLogProb(torch.autograd.Function):
    """log softmax(logits / T)[label] and entropy, with softmax as the only tensor kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        vocab_size: int,
        start: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.float() / temperature
        num_real = max(0, min(vocab_size - start, logits.shape[-1]))
        scaled[..., num_real:] = -torch.inf
        largest = scaled.amax(dim=-1)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scaled -= largest.unsqueeze(-1)

        local = labels - start
        is_local = (local >= 0) & (local < logits.shape[-1])
        local = torch.where(is_local, local, 0)
        label_logit = scaled.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        label_logit = torch.where(is_local, label_logit, 0.0)
        masses = scaled.exp()
        # exp(-inf) * -inf is NaN; the padding is left out instead.
        weighted = (masses[..., :num_real] * scaled[..., :num_real]).sum(dim=-1)
        sums = torch.stack([masses.sum(dim=-1), weighted, label_logit])
        if group is not None:
            dist.all_reduce(sums, group=group)
        mass, weighted, label_logit = sums
        log_mass = mass.log()
        softmax = masses.div_(mass.unsqueeze(-1))
        entropy = log_mass - weighted / mass
        ctx.save_for_backward(softmax, local, is_local, entropy)
        ctx.temperature = temperature
        ctx.dtype = logits.dtype
        return label_logit - log_mass, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprob, grad_entropy = gradients
        softmax, local, is_local, entropy = ctx.saved_tensors
        # d logprob / d z_i = 1[i = label] - p_i
        grad = -softmax * grad_logprob.unsqueeze(-1)
        at_label = torch.where(is_local, grad_logprob, 0.0).unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), at_label)
        if bool((grad_entropy != 0).any()):
            # d entropy / d z_i = -p_i (log p_i + entropy)
            surprise = torch.xlogy(softmax, softmax) + softmax * entropy.unsqueeze(-1)
            grad -= surprise * grad_entropy.unsqueeze(-1)
        untouched = (grad_logprob == 0) & (grad_entropy == 0)
        grad = grad.masked_fill_(untouched.unsqueeze(-1), 0.0) / ctx.temperature
        return grad.to(ctx.dtype), None, None, None, None, None
