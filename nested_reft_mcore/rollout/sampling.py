"""From shards of the logits to tokens and log-probabilities, never gathering the vocabulary.

Every tensor-parallel rank calls `sample_tokens` with its own columns of the logits and the same
uniform numbers, and gets the same tokens. What travels is a few numbers per row, whatever the
size of the vocabulary.

A token is drawn by inverse CDF from one uniform number: over ranks, then over blocks of 128 ids,
then inside a block. Weights are float32 exponentials relative to the global maximum, so they don't
depend on how the vocabulary is cut; every sum of them is float64. A float32 cumulative sum over a
real vocabulary would misplace one draw in several hundred whenever rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from nested_reft_mcore.rollout.types import SamplingParams

BLOCK = 128
"""Ids in a block of the two-level search."""


def sample_tokens(
    local_logits: Float[Tensor, "batch vocab_local"],
    uniforms: Float64[Tensor, " batch"],
    params: SamplingParams,
    *,
    vocab_start: int,
    vocab_size: int,
    group: ProcessGroup | None = None,
) -> tuple[Int64[Tensor, " batch"], Float32[Tensor, " batch"]]:
    """Choose one token per row and give its log-probability in nats, the same on every rank.

    `local_logits` are the ids `vocab_start, vocab_start + 1, ...`; ids from `vocab_size` on are
    padding, are never read and have probability zero. Ranks of `group` hold ascending shards;
    without a group the shard is everything. `uniforms` lie in [0, 1).

    Drawing follows softmax(logits / temperature), cut to the top-k and then to the top-p tokens
    and renormalised: the log-probability is of this very distribution. Truncation keeps every
    token that ties with the last one kept. Greedy takes the largest logit, the lowest id of
    several, ignores top-k and top-p, and reports its log-probability in the whole softmax at the
    temperature.
    """
    scaled = _scaled_blocks(local_logits, params.temperature, vocab_size - vocab_start)
    maximum = _all_reduce(scaled.amax(dim=1), ReduceOp.MAX, group)
    weights = (scaled - maximum[:, None]).exp_()
    if params.greedy:
        return _argmax(scaled, weights, maximum, vocab_start, group)
    _truncate(weights, scaled, params, group)
    return _draw(weights, scaled, maximum, uniforms, vocab_start, group)


def _scaled_blocks(
    local_logits: Float[Tensor, "batch vocab_local"], temperature: float, num_real: int
) -> Float32[Tensor, "batch blocks_times_128"]:
    """Logits over temperature, filled up to whole blocks with minus infinity; padding dropped."""
    num_real = max(0, min(local_logits.shape[1], num_real))
    num_blocks = max(1, -(-num_real // BLOCK))
    scaled = local_logits.new_full(
        (local_logits.shape[0], num_blocks * BLOCK), float("-inf"), dtype=torch.float32
    )
    scaled[:, :num_real] = local_logits[:, :num_real]
    return scaled if temperature == 1.0 else scaled.div_(temperature)


def _argmax(
    scaled: Tensor, weights: Tensor, maximum: Tensor, vocab_start: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The lowest id with the largest logit, and its log-probability in the whole softmax."""
    mine = scaled.argmax(dim=1) + vocab_start
    nobody = torch.iinfo(torch.int64).max
    mine = torch.where(scaled.amax(dim=1) == maximum, mine, nobody)
    tokens = _all_reduce(mine, ReduceOp.MIN, group)
    total = _all_reduce(_mass(weights), ReduceOp.SUM, group)
    return tokens, -total.log().float()


def _truncate(
    weights: Tensor, scaled: Tensor, params: SamplingParams, group: ProcessGroup | None
) -> None:
    """Set the weights of tokens outside top-k and then top-p to zero, in place."""
    if params.top_k is not None:
        threshold = _largest_threshold(
            scaled,
            lambda kept: kept.sum(dim=1, dtype=torch.float64),
            weights.new_tensor(float(params.top_k), dtype=torch.float64),
            group,
        )
        weights.masked_fill_(scaled < threshold[:, None], 0.0)
    if params.top_p is not None and params.top_p < 1.0:
        needed = params.top_p * _all_reduce(_mass(weights), ReduceOp.SUM, group)
        threshold = _largest_threshold(scaled, lambda kept: _mass(weights * kept), needed, group)
        weights.masked_fill_(scaled < threshold[:, None], 0.0)


def _largest_threshold(
    scaled: Float32[Tensor, "batch vocab_local"],
    measure: Callable[[Tensor], Tensor],
    needed: Tensor,
    group: ProcessGroup | None,
) -> Float32[Tensor, " batch"]:
    """Per row the largest t for which the tokens with logit >= t measure at least `needed`.

    `measure` turns a mask over the shard into a float64 number per row, which is summed over
    ranks. The search bisects the 32-bit patterns of float32, which order like the numbers, so it
    is exact and takes at most 32 rounds. Minus infinity where even all tokens measure less.
    """
    batch = scaled.shape[0]
    low = _ordered_key(scaled.new_full((batch,), float("-inf")))
    high = _ordered_key(scaled.new_full((batch,), float("inf")))
    for _ in range(32):
        middle = (low + high) // 2
        kept = scaled >= _from_ordered_key(middle)[:, None]
        enough = _all_reduce(measure(kept), ReduceOp.SUM, group) >= needed
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    return _from_ordered_key(low)


def _ordered_key(values: Float32[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """Integers in the order of the float32 numbers."""
    bits = values.view(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)


def _from_ordered_key(keys: Int64[Tensor, " batch"]) -> Float32[Tensor, " batch"]:
    """Inverse of `_ordered_key`."""
    bits = keys.to(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).view(torch.float32)


def _draw(
    weights: Float32[Tensor, "batch vocab_local"],
    scaled: Float32[Tensor, "batch vocab_local"],
    maximum: Float32[Tensor, " batch"],
    uniforms: Float64[Tensor, " batch"],
    vocab_start: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Inverse CDF over ranks, blocks and ids; the rank that owns the token tells the others."""
    rows = torch.arange(weights.shape[0], device=weights.device)
    blocks = weights.view(weights.shape[0], -1, BLOCK)
    block_ends = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    rank_ends = _all_gather(block_ends[:, -1], group).cumsum(dim=1)
    total = rank_ends[:, -1]
    owner, target = _search(rank_ends, uniforms * total)
    block, target = _search(block_ends, target)
    inside, _ = _search(blocks[rows, block].to(torch.float64).cumsum(dim=1), target)
    column = block * BLOCK + inside
    mine = owner == (dist.get_rank(group) if group is not None else 0)
    # Both numbers are exact in float64, and so is their sum with the other ranks' zeros.
    found = torch.stack(
        [(column + vocab_start).to(torch.float64), scaled[rows, column].to(torch.float64)]
    )
    found = torch.where(mine, found, 0.0)
    token, logit = _all_reduce(found, ReduceOp.SUM, group)
    logprobs = logit - maximum.to(torch.float64) - total.log()
    return token.to(torch.int64), logprobs.float()


def _search(
    ends: Float64[Tensor, "batch n"], target: Float64[Tensor, " batch"]
) -> tuple[Int64[Tensor, " batch"], Float64[Tensor, " batch"]]:
    """Index of the interval that holds `target`, and the target relative to its beginning.

    Interval i is [ends[i-1], ends[i]); an empty one is never chosen. Where rounding put the
    target at or beyond the end, the last interval that is not empty is chosen.
    """
    index = torch.searchsorted(ends, target[:, None], right=True)
    last = torch.searchsorted(ends, ends[:, -1:].contiguous(), right=False)
    index = torch.minimum(index, last).clamp_(max=ends.shape[1] - 1)
    begin = torch.where(index > 0, ends.gather(1, (index - 1).clamp_(min=0)), 0.0)
    return index[:, 0], target - begin[:, 0]


def _mass(weights: Float32[Tensor, "batch vocab_local"]) -> Float64[Tensor, " batch"]:
    """Sum of a row's weights."""
    return weights.sum(dim=1, dtype=torch.float64)


def _all_reduce(value: Tensor, op: ReduceOp.RedOpType, group: ProcessGroup | None) -> Tensor:
    """`value`, a temporary that is overwritten, reduced over the group if there is one."""
    if group is None:
        return value
    value = value.contiguous()
    dist.all_reduce(value, op=op, group=group)
    return value


def _all_gather(
    value: Float64[Tensor, " batch"], group: ProcessGroup | None
) -> Float64[Tensor, "batch ranks"]:
    """One column per rank."""
    if group is None:
        return value[:, None]
    value = value.contiguous()
    columns = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(columns, value, group=group)
    return torch.stack(columns, dim=1)
