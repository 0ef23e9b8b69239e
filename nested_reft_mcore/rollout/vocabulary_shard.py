"""Distributions over a vocabulary that is cut over ranks: weights, masses and inverse CDF.

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

BLOCK = 128
"""Ids in a block of the two-level search."""


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

    def is_owner(self, owner: Int64[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
        """Whether `owner`, a place in the order of the shards, is this rank."""
        return owner == (dist.get_rank(self.group) if self.group is not None else 0)

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


@dataclass(frozen=True)
class Masses:
    """What of a distribution lies where: the upper levels of the inverse CDF."""

    block_ends: Float64[Tensor, "rows blocks"]
    """Running sums of the weights of this shard, block by block."""
    rank_ends: Float64[Tensor, "rows ranks"]
    """Running sums over the shards."""

    @property
    def total(self) -> Float64[Tensor, " rows"]:
        """Mass of the whole vocabulary."""
        return self.rank_ends[:, -1]

    @classmethod
    def of_blocks(cls, block_sums: Float[Tensor, "rows blocks"], shard: VocabularyShard) -> Masses:
        """From the masses of this shard's blocks; all ranks have to call."""
        block_ends = block_sums.cumsum(dim=1, dtype=torch.float64)
        return cls(block_ends, shard.gather(block_ends[:, -1]).cumsum(dim=1))

    def where(self, condition: Bool[Tensor, " rows"], other: Masses) -> Masses:
        """These masses in the rows where the condition holds, `other` elsewhere."""
        column = condition[:, None]
        return Masses(
            torch.where(column, self.block_ends, other.block_ends),
            torch.where(column, self.rank_ends, other.rank_ends),
        )

    def take(self, rows: Int64[Tensor, " some"]) -> Masses:
        """The masses of these rows."""
        return Masses(self.block_ends[rows], self.rank_ends[rows])

    def search(
        self, uniforms: Float64[Tensor, " rows"], shard: VocabularyShard
    ) -> tuple[Bool[Tensor, " rows"], Int64[Tensor, " rows"], Float64[Tensor, " rows"]]:
        """Where the number in [0, 1) falls: whether it is here, the block, the mass into it."""
        owner, target = search_interval(self.rank_ends, uniforms * self.total)
        block, target = search_interval(self.block_ends, target)
        return shard.is_owner(owner), block, target


def block_sums(weights: Float32[Tensor, "rows blocks_times_128"]) -> Float32[Tensor, "rows blocks"]:
    """Mass of every block.

    In float32: no weight is negative, so a sum of 128 by vectors and then pairwise is off by a
    few units of its own last place, as its weights are. Only sums of blocks, which are long and
    whose small differences place a draw, need float64; that way no float64 copy of the vocabulary
    is made.
    """
    return weights.view(weights.shape[0], -1, BLOCK).sum(dim=2)


def exponential_weights(
    logits: Float32[Tensor, "rows real"], maximum: Float32[Tensor, " rows"], temperature: float
) -> Float32[Tensor, "rows blocks_times_128"]:
    """exp((logits - maximum) / temperature), filled up to whole blocks with zeros.

    The difference is taken first: then nothing overflows, and the largest weight is exactly 1.
    """
    num_real = logits.shape[1]
    num_blocks = max(1, -(-num_real // BLOCK))
    weights = logits.new_empty((logits.shape[0], num_blocks * BLOCK))
    torch.sub(logits, maximum[:, None], out=weights[:, :num_real])
    weights[:, num_real:] = -torch.inf
    if temperature != 1.0:
        weights.div_(temperature)
    return weights.exp_()


def search_interval(
    ends: Float64[Tensor, "rows n"], target: Float64[Tensor, " rows"]
) -> tuple[Int64[Tensor, " rows"], Float64[Tensor, " rows"]]:
    """Index of the interval that holds `target`, and the target relative to its beginning.

    Interval i is [ends[i-1], ends[i]); an empty one is never chosen. Where rounding put the
    target at or beyond the end, the last interval that is not empty is chosen.
    """
    index = torch.searchsorted(ends, target[:, None], right=True)
    last = torch.searchsorted(ends, ends[:, -1:].contiguous(), right=False)
    index = torch.minimum(index, last).clamp_(max=ends.shape[1] - 1)
    begin = torch.where(index > 0, ends.gather(1, (index - 1).clamp_(min=0)), 0.0)
    return index[:, 0], target - begin[:, 0]


def search_block(
    inside: Float32[Tensor, "rows 128"],
    block: Int64[Tensor, " rows"],
    target: Float64[Tensor, " rows"],
) -> Int64[Tensor, " rows"]:
    """Column of the shard: the last level of the inverse CDF, given the block's weights."""
    place, _ = search_interval(inside.cumsum(dim=1, dtype=torch.float64), target)
    return block * BLOCK + place


def take_block(
    weights: Float32[Tensor, "rows blocks_times_128"],
    rows: Int64[Tensor, " some"],
    block: Int64[Tensor, " some"],
) -> Float32[Tensor, "some 128"]:
    """The weights of one block of each of these rows."""
    return weights.view(weights.shape[0], -1, BLOCK)[rows, block]
