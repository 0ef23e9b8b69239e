"""From shards of the logits to tokens and log-probabilities, never gathering the vocabulary.

Every tensor-parallel rank calls `sample_tokens` with its own columns of the logits and the same
uniform numbers, and gets the same tokens. What travels is a few numbers per row, whatever the
size of the vocabulary.

A token is drawn as the winner of a race (Gumbel-max in other words): every block of 128 ids arrives
after an exponential time with its mass as rate, then every id of the winning block does. The times
are functions of the row's one uniform number and of ids, so whoever holds an id knows them, and a
race only changes its winner where two arrive within rounding of each other. An inverse CDF changes
wherever a boundary moves, and a real vocabulary has thousands of them: with rounding as another
layout gives it, that is tens of draws in 10,000, however exact the sums (benchmarks/bench_draws.py
has the figures). Two levels, because noise for every id would cost ten times as much.

Weights are float32 exponentials relative to the global maximum, so they don't depend on how the
vocabulary is cut; nor do draws, where shards begin at multiples of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from nested_reft_mcore.rollout.truncation import keep_top_k, keep_top_p
from nested_reft_mcore.rollout.types import SamplingParams
from nested_reft_mcore.rollout.vocabulary_shard import (
    VocabularyShard,
    block_sums,
    exponential_weights,
    race_blocks,
    race_inside,
    take_block,
)

NO_TOKEN = -1
"""Stands where no token could be chosen, because the row's logits make no distribution."""


@torch.no_grad()
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
    without a group the shard is everything. `uniforms` are the keys of the rows' races: equal
    numbers mean equal races.

    Drawing follows softmax(logits / temperature), cut to the top-k and then to the top-p tokens
    and renormalised: the log-probability is of this very distribution. Truncation keeps every
    token that ties with the last one kept. Greedy takes the largest logit, the lowest id of
    several, ignores top-k and top-p, and reports its log-probability in the whole softmax at the
    temperature.

    A row that makes no distribution, because any rank's real logits hold NaN or plus infinity or
    all of them are minus infinity, gets NO_TOKEN and the log-probability NaN on every rank; other
    rows are as without it.
    """
    shard = VocabularyShard(vocab_start, vocab_size, group)
    if params.greedy:
        return largest_tokens(local_logits, params.temperature, shard)
    target = Distribution.from_logits(local_logits, params, shard)
    return target.draw(uniforms, shard)


@dataclass(frozen=True)
class Distribution:
    """What tokens are drawn from, row by row, as far as this shard knows it."""

    logits: Float32[Tensor, "rows real"]
    """Real ids only, as they came."""
    weights: Float32[Tensor, "rows padded"]
    """exp((logits - maximum) / temperature), zero outside of top-k and top-p; whole blocks."""
    block_masses: Float32[Tensor, "rows blocks"]
    """Sums of the weights of each block of this shard."""
    total: Float64[Tensor, " rows"]
    """Sum of the weights of all shards."""
    maximum: Float32[Tensor, " rows"]
    """Largest logit of all shards."""
    broken: Bool[Tensor, " rows"]
    """Whether the row makes no distribution; its other numbers mean nothing then."""
    temperature: float

    @classmethod
    def from_logits(
        cls,
        local_logits: Float[Tensor, "rows vocab_local"],
        params: SamplingParams,
        shard: VocabularyShard,
    ) -> Distribution:
        """Temperature, top-k and top-p applied; all ranks have to call. Not for greedy."""
        logits = shard.real(local_logits)
        maximum, broken = shard.maximum(_local_maximum(logits))
        weights = exponential_weights(logits, maximum, params.temperature)
        if params.top_k is not None:
            keep_top_k(weights, logits, params.top_k, shard)
        if params.top_p is not None and params.top_p < 1.0:
            keep_top_p(weights, params.top_p, shard)
        masses = block_sums(weights)
        total = shard.reduce(masses.sum(dim=1, dtype=torch.float64), ReduceOp.SUM)
        return cls(logits, weights, masses, total, maximum, broken, params.temperature)

    def draw(
        self, uniforms: Float64[Tensor, " rows"], shard: VocabularyShard
    ) -> tuple[Int64[Tensor, " rows"], Float32[Tensor, " rows"]]:
        """A token of each row, with its log-probability; all ranks have to call."""
        rows = torch.arange(uniforms.shape[0], device=uniforms.device)
        speed, block = race_blocks(self.block_masses, uniforms, shard)
        inside = take_block(self.weights, rows, block)
        column = race_inside(inside, block, uniforms, shard)
        return self.announce(rows, speed, column, shard)

    def announce(
        self,
        rows: Int64[Tensor, " some"],
        speed: Float64[Tensor, " some"],
        column: Int64[Tensor, " some"],
        shard: VocabularyShard,
    ) -> tuple[Int64[Tensor, " some"], Float32[Tensor, " some"]]:
        """For each of these rows the fastest rank's column, as token and log-prob on every rank."""
        if self.logits.shape[1]:
            logit = self.logits[rows, column.clamp(max=self.logits.shape[1] - 1)]
        else:
            logit = torch.zeros_like(self.maximum[rows])
        # All three are exact in float64.
        candidates = shard.gather(torch.stack([speed, column + shard.vocab_start, logit]))
        winner = candidates[0].argmax(dim=-1)
        _, token, logit = candidates.gather(2, winner.expand(3, -1)[..., None])[..., 0]
        return hide_broken(token.to(torch.int64), self.logprobs(rows, logit), self.broken[rows])

    def logprobs(
        self, rows: Int64[Tensor, " some"], logits: Float64[Tensor, " some"]
    ) -> Float64[Tensor, " some"]:
        """Log-probabilities in nats of tokens of these rows that are kept and have these logits."""
        scaled = (logits - self.maximum[rows].to(torch.float64)) / self.temperature
        return scaled - self.total[rows].log()


def largest_tokens(
    local_logits: Float[Tensor, "rows vocab_local"], temperature: float, shard: VocabularyShard
) -> tuple[Int64[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """The lowest id with the largest logit, and its log-probability in the whole softmax."""
    logits = shard.real(local_logits)
    nobody = torch.iinfo(torch.int64).max
    if logits.shape[1] == 0:
        local = _local_maximum(logits)
        tokens = torch.full_like(local, nobody, dtype=torch.int64)
    else:
        local, tokens = logits.max(dim=1)
    maximum, broken = shard.maximum(local)
    tokens = torch.where(local == maximum, tokens + shard.vocab_start, nobody)
    tokens = shard.reduce(tokens, ReduceOp.MIN)
    sums = block_sums(exponential_weights(logits, maximum, temperature))
    total = shard.reduce(sums.sum(dim=1, dtype=torch.float64), ReduceOp.SUM)
    return hide_broken(tokens, -total.log(), broken)


def hide_broken(
    tokens: Int64[Tensor, " rows"],
    logprobs: Float64[Tensor, " rows"],
    broken: Bool[Tensor, " rows"],
) -> tuple[Int64[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """NO_TOKEN and NaN where the row makes no distribution."""
    tokens = torch.where(broken, NO_TOKEN, tokens)
    return tokens, torch.where(broken, torch.nan, logprobs).float()


def _local_maximum(logits: Float32[Tensor, "rows real"]) -> Float32[Tensor, " rows"]:
    """Largest logit of the shard; minus infinity where it is all padding."""
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), -torch.inf)
    return logits.amax(dim=1)
