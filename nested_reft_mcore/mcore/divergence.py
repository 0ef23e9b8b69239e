"""How far the nested policy is from the full one: over the whole vocabulary, at every token.

Tensor-parallel ranks keep their own columns of both distributions and add up partial sums; what
travels is a few numbers a token. Pipeline stages run Megatron's own schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.launch.context import ParallelDimension
from nested_reft_mcore.mcore.agreement import from_last_stage
from nested_reft_mcore.mcore.micro_batches import equal_micro_batches
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.pipeline import run_schedule
from nested_reft_mcore.rollout.batch import TrainingBatch


@dataclass(frozen=True)
class SequenceDivergence:
    """Sums over the response tokens of each sequence, `[batch]` float64 on the CPU."""

    kl: Tensor
    """KL(nested || full), nats."""
    overlap: Tensor
    """Sum over the vocabulary of min(nested, full): the chance that a nested token is accepted."""


class DivergenceMeter:
    """The full policy's distributions at a batch's response tokens, to compare nested ones with.

    It holds `[response tokens, vocab / tensor size]` float32 on the last stage. Every process of
    the policy makes it and calls it alike.
    """

    def __init__(
        self, policy: Policy, batch: TrainingBatch, *, micro_batch_size: int, temperature: float
    ) -> None:
        """Run the full policy over `batch`, at `temperature`."""
        self._policy = policy
        self._temperature = temperature
        self._micro_batch_size = micro_batch_size
        self._num_rows = len(batch)
        self._made = equal_micro_batches(batch, micro_batch_size, policy.context)
        with policy.nested(LayerSkipPlan.full(policy.architecture.num_layers)):
            self._full = self._logprobs()

    @property
    def num_tokens(self) -> Tensor:
        """Response tokens of each sequence, `[batch]` float64."""
        masks = torch.cat([batch.response_mask for batch in self._made.batches])
        return masks.sum(dim=1)[: self._num_rows].double()

    def measure(self, plan: LayerSkipPlan) -> SequenceDivergence:
        """Run the policy under `plan` and compare; the same result on every process."""
        context = self._policy.context
        rows = self._micro_batch_size * len(self._made.batches)
        sums = torch.zeros((2, rows), dtype=torch.float64, device=context.device)
        with self._policy.nested(plan):
            nested = self._logprobs()
        if context.is_last_stage:
            parts = []
            for batch, ours, full in zip(self._made.batches, nested, self._full, strict=True):
                values = _divergence(ours, full, context.tensor)
                by_row = sums.new_zeros((2, self._micro_batch_size))
                row_of_token = batch.response_mask.nonzero()[:, 0].to(context.device)
                parts.append(by_row.index_add_(1, row_of_token, values))
            sums = torch.cat(parts, dim=1)
        kl, overlap = from_last_stage(sums, context).cpu()[:, : self._num_rows]
        return SequenceDivergence(kl, overlap)

    def _logprobs(self) -> list[Tensor]:
        """For each micro-batch `[response tokens, vocab_local]` float32; empty on other stages."""
        policy, context = self._policy, self._policy.context
        collected: list[Tensor] = []

        def keep(batch: TrainingBatch, logits: Tensor) -> tuple[Tensor, Tensor, None]:
            chosen = logits[batch.response_mask]
            vocab_size = policy.architecture.vocab_size
            collected.append(_shard_logprobs(chosen, self._temperature, vocab_size, context.tensor))
            return logits.new_zeros(()), torch.ones((), dtype=torch.int, device=logits.device), None

        run_schedule(policy, self._made, keep, forward_only=True)
        return collected


def _shard_logprobs(
    logits: Tensor, temperature: float, vocab_size: int, tensor: ParallelDimension
) -> Tensor:
    """Log-probabilities `[tokens, real ids here]` float32 of this rank's columns."""
    start = tensor.rank * logits.shape[-1]
    num_real = max(0, min(vocab_size - start, logits.shape[-1]))
    scaled = logits[:, :num_real].float() / temperature
    if tensor.group is None:
        return scaled.log_softmax(dim=-1)
    # A rank whose columns are all padding has no maximum of its own.
    padded = torch.cat([scaled, scaled.new_full((scaled.shape[0], 1), -torch.inf)], dim=1)
    largest = padded.amax(dim=1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tensor.group)
    scaled -= largest[:, None]
    mass = scaled.exp().sum(dim=1)
    dist.all_reduce(mass, group=tensor.group)
    return scaled - mass.log()[:, None]


def _divergence(nested: Tensor, full: Tensor, tensor: ParallelDimension) -> Tensor:
    """KL(nested || full) and the sum of minima of every token, `[2, tokens]` float64."""
    probabilities = nested.exp()
    kl = (probabilities * (nested - full)).sum(dim=1, dtype=torch.float64)
    overlap = torch.minimum(probabilities, full.exp()).sum(dim=1, dtype=torch.float64)
    sums = torch.stack([kl, overlap])
    if tensor.group is not None:
        dist.all_reduce(sums, group=tensor.group)
    return sums
