"""Weights over a vocabulary that is cut over ranks, and the race that draws from them.

Every rank of the group holds an ascending run of ids and calls the same functions in the same
order. What travels is a few numbers per row, whatever the size of the vocabulary; nothing here
reads a value back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from nested_reft_mcore.algorithm import counter_random
from nested_reft_mcore.algorithm.counter_random import Stream

BLOCK = 128
"""Ids in a block of the two-level race."""
_LEAST_EXPONENT = -87.0
"""Weights below e to this are zero. They would be denormal, which takes CPUs ten times as long."""


@dataclass(frozen=True)
class VocabularyShard:
    """Which ids this rank holds, and how it talks to the ranks that hold the others."""

    vocab_start: int
    """Id of the first column."""
    vocab_size: int
    """Number of real ids; columns from this id on are padding."""
    group: ProcessGroup | None = None
    """Ranks that hold ascending shards; without it this shard is everything."""

    def real(self, logits: Float[Tensor, "rows vocab_local"]) -> Float32[Tensor, "rows real"]:
        """The columns of real ids, as float32: a view where they are float32 already."""
        num_real = max(0, min(logits.shape[1], self.vocab_size - self.vocab_start))
        return logits[:, :num_real].to(torch.float32)

    def reduce(self, value: Tensor, op: ReduceOp.RedOpType) -> Tensor:
        """`value`, a temporary that may be overwritten, reduced over the ranks."""
        if self.group is None:
            return value
        value = value.contiguous()
        dist.all_reduce(value, op=op, group=self.group)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """`value` of every rank, in the order of the shards, along a new last dimension."""
        if self.group is None:
            return value.unsqueeze(-1)
        value = value.contiguous()
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, value, group=self.group)
        return torch.stack(parts, dim=-1)

    def maximum(
        self, local: Float32[Tensor, " rows"]
    ) -> tuple[Float32[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """The largest of all ranks' numbers, and whether the row makes no distribution.

        It makes none where any rank's number is NaN or plus infinity, or all are minus infinity.
        """
        # Reductions over ranks don't agree on what becomes of NaN; of infinity they do.
        local = torch.where(local.isnan(), torch.inf, local)
        maximum = self.reduce(local, ReduceOp.MAX)
        return maximum, maximum.isinf()


def block_sums(weights: Float32[Tensor, "rows padded"]) -> Float32[Tensor, "rows blocks"]:
    """Mass of every block.

    In float32: no weight is negative, so a sum of 128 by vectors and then pairwise is off by a
    few units of its own last place, as its weights are. Only sums over blocks, which are long, are
    float64; that way no float64 copy of the vocabulary is made.
    """
    return _blocks(weights).sum(dim=2)


def _blocks(weights: Float32[Tensor, "rows padded"]) -> Float32[Tensor, "rows blocks ids"]:
    width = weights.shape[1]
    return weights.view(weights.shape[0], width // min(width, BLOCK), min(width, BLOCK))


def exponential_weights(
    logits: Float32[Tensor, "rows real"], maximum: Float32[Tensor, " rows"], temperature: float
) -> Float32[Tensor, "rows padded"]:
    """exp((logits - maximum) / temperature), filled up to whole blocks with zeros.

    The difference is taken first: then nothing overflows, and the largest weight is exactly 1.
    """
    num_real = logits.shape[1]
    # A shard smaller than a block is a block of its own size.
    width = max(1, num_real) if num_real < BLOCK else -(-num_real // BLOCK) * BLOCK
    weights = logits.new_empty((logits.shape[0], width))
    torch.sub(logits, maximum[:, None], out=weights[:, :num_real])
    weights[:, num_real:] = -torch.inf
    if temperature != 1.0:
        weights.div_(temperature)
    return torch.threshold_(weights, _LEAST_EXPONENT, -torch.inf).exp_()


def race_blocks(
    block_masses: Float32[Tensor, "rows blocks"],
    uniforms: Float64[Tensor, " rows"],
    shard: VocabularyShard,
) -> tuple[Float64[Tensor, " rows"], Int64[Tensor, " rows"]]:
    """The fastest block of this shard, with its speed: drawn with probability as its mass.

    A block arrives after an exponential time with its mass as rate; the first of several arrives
    first with the probability of its share, over any number of ranks. Speed is one over time.
    """
    first_ids = shard.vocab_start + BLOCK * torch.arange(
        block_masses.shape[1], device=block_masses.device
    )
    speed, block = (block_masses / _times(Stream.BLOCK_NOISE, uniforms, first_ids)).max(dim=1)
    return speed, block


def race_inside(
    weights: Float32[Tensor, "rows ids"],
    block: Int64[Tensor, " rows"],
    uniforms: Float64[Tensor, " rows"],
    shard: VocabularyShard,
) -> Int64[Tensor, " rows"]:
    """The column of the shard that wins within the block whose weights these are."""
    columns = BLOCK * block[:, None] + torch.arange(weights.shape[1], device=block.device)
    times = _times(Stream.TOKEN_NOISE, uniforms, shard.vocab_start + columns)
    return BLOCK * block + (weights / times).argmax(dim=1)


def _times(
    stream: Stream, uniforms: Float64[Tensor, " rows"], ids: Int64[Tensor, "..."]
) -> Float64[Tensor, "rows n"]:
    """Standard exponential times, positive, as a pure function of the row's number and the id.

    The number serves as a key by its bits alone; it comes from another stream, of more keys.
    """
    key = uniforms.view(torch.int64)[:, None]
    return counter_random.uniforms(int(stream), key, ids).log_().neg_()


def take_block(
    weights: Float32[Tensor, "rows padded"],
    rows: Int64[Tensor, " some"],
    block: Int64[Tensor, " some"],
) -> Float32[Tensor, "some ids"]:
    """The weights of one block of each of these rows."""
    return _blocks(weights)[rows, block]
