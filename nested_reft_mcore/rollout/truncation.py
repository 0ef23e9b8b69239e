"""Top-k and top-p over shards of the vocabulary, by thresholds that are exact."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Float64, Int32
from torch import Tensor
from torch.distributed import ReduceOp

from nested_reft_mcore.rollout.vocabulary_shard import VocabularyShard, block_sums

_KEY_OF_ONE = 0x3F800000
"""Bit pattern of 1.0, the largest weight there is."""


def keep_top_k(
    weights: Float32[Tensor, "rows padded"],
    logits: Float32[Tensor, "rows real"],
    top_k: int,
    shard: VocabularyShard,
) -> None:
    """Set weights of all but the `top_k` largest logits, and ties with the last, to zero.

    The k-th largest of all is the k-th largest of the k largest of every shard: k numbers per row
    and rank travel.
    """
    if top_k >= shard.vocab_size:
        return
    num_local = min(top_k, logits.shape[1])
    largest = logits.new_full((logits.shape[0], top_k), -torch.inf)
    largest[:, :num_local] = logits.topk(num_local, dim=1, sorted=False).values
    if shard.group is not None:
        largest = shard.gather(largest).flatten(1).topk(top_k, dim=1, sorted=False).values
    threshold = largest.amin(dim=1, keepdim=True)
    weights[:, : logits.shape[1]].masked_fill_(logits < threshold, 0.0)


def keep_top_p(
    weights: Float32[Tensor, "rows padded"], top_p: float, shard: VocabularyShard
) -> None:
    """Set weights to zero below the largest threshold that leaves `top_p` of the mass.

    The threshold is found by bisecting the bit patterns of float32 in [0, 1], which order like
    the numbers: 30 rounds, each of one sum per row over the ranks. A sum of numbers that are not
    negative never grows where some of them become zero, in floating point too, so the search is
    exact for the sums as they are computed.
    """
    keys = weights.view(torch.int32)
    kept = torch.empty_like(keys)
    needed = top_p * _mass_from(keys, keys.new_zeros(keys.shape[0]), kept, shard)
    low = keys.new_zeros(keys.shape[0])
    high = torch.full_like(low, _KEY_OF_ONE + 1)
    for _ in range(_KEY_OF_ONE.bit_length()):
        middle = (low + high) // 2
        enough = _mass_from(keys, middle, kept, shard) >= needed
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    keys.copy_(_only_from(keys, low, kept))


def _mass_from(
    keys: Int32[Tensor, "rows padded"],
    threshold: Int32[Tensor, " rows"],
    kept: Int32[Tensor, "rows padded"],
    shard: VocabularyShard,
) -> Float64[Tensor, " rows"]:
    """Mass over all ranks of the weights whose key is at least the threshold."""
    sums = block_sums(_only_from(keys, threshold, kept).view(torch.float32))
    return shard.reduce(sums.sum(dim=1, dtype=torch.float64), ReduceOp.SUM)


def _only_from(
    keys: Int32[Tensor, "rows padded"],
    threshold: Int32[Tensor, " rows"],
    kept: Int32[Tensor, "rows padded"],
) -> Int32[Tensor, "rows padded"]:
    """`keys` where they are at least the threshold, else 0; written into `kept`.

    By integer arithmetic: the sign of (threshold - 1 - key), spread over the word, is the mask.
    On a CPU that takes a quarter of the time of a comparison and a selection.
    """
    torch.sub((threshold - 1)[:, None], keys, out=kept)
    kept.bitwise_right_shift_(31)
    return kept.bitwise_and_(keys)
