"""From token losses to one number: a sum here, and a denominator that is the global batch's.

A micro-batch returns its sum beside its share of the denominator. Whoever owns the global batch
adds both over micro-batches, accumulation steps and replicas and divides once, so that no split
changes the result. The names are verl's (`loss_agg_mode`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.masking import fill_masked

LossAggMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@dataclass(frozen=True)
class Aggregate:
    """A micro-batch's part of (sum over all micro-batches) / (denominators of all)."""

    loss_sum: Float[Tensor, ""]
    denominator: Int64[Tensor, ""]


def aggregate(
    losses: Float[Tensor, "batch seq"],
    kept: Bool[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    mode: LossAggMode,
    max_response_length: int,
) -> Aggregate:
    """Add up the losses of the kept tokens.

    - `token-mean`: over the number of kept tokens (DAPO, arXiv 2503.14476);
    - `seq-mean-token-mean`: each sequence's mean over its own kept tokens, over the number of
      sequences that keep one (GRPO, arXiv 2402.03300);
    - `seq-mean-token-sum-norm`: over `max_response_length` times the number of sequences, a
      constant that nothing that was sampled or rejected changes (Dr. GRPO, arXiv 2503.20783).

    Raises ValueError for an unknown mode or a length below 1.
    """
    if mode not in get_args(LossAggMode):
        raise ValueError(f"unknown loss_agg_mode {mode!r}: choose one of {get_args(LossAggMode)}")
    if max_response_length < 1:
        raise ValueError(f"max_response_length must be at least 1, got {max_response_length}")
    losses = fill_masked(losses, kept)
    if mode == "token-mean":
        return Aggregate(losses.sum(), kept.sum())
    if mode == "seq-mean-token-mean":
        num_kept = kept.sum(dim=-1)
        means = losses.sum(dim=-1) / num_kept.clamp(min=1)
        return Aggregate(means.sum(), (num_kept > 0).sum())
    # Rows without a response fill up a micro-batch and are no sequences of the batch.
    return Aggregate(losses.sum() / max_response_length, response_mask.any(dim=-1).sum())
