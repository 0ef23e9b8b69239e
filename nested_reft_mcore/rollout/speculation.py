"""Lossless self-speculation: a cheap model proposes tokens, the full model checks them all at once.

After Leviathan, Kalman and Matias, arXiv 2211.17192. A token x drafted from q is accepted with
probability min(1, p(x) / q(x)); the first rejected one is replaced by a draw from the residual
norm(max(p - q, 0)), and where all were accepted one more token is drawn from p. What comes out has
the law of p whatever q is. Here q is the model with layers skipped and p the same model with all of
them; p and q are what is really sampled from, after temperature, top-k and top-p.

Sharded over the vocabulary as `sampling` is: p and q of a drafted token come from the rank that
owns it, and the residual is drawn by the same race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from nested_reft_mcore.rollout.sampling import (
    NO_TOKEN,
    Distribution,
    largest_tokens,
)
from nested_reft_mcore.rollout.types import SamplingParams
from nested_reft_mcore.rollout.vocabulary_shard import (
    VocabularyShard,
    block_sums,
    race_blocks,
    race_inside,
    take_block,
)

_SMALLEST_RESIDUAL = 2.0**-20
"""Mass below which a residual is rounding of p and q, and p is drawn from instead.

A rejection has the probability of the residual's mass, so this moves no probability by more.
"""


@dataclass(frozen=True)
class Proposal:
    """One drafted token per row, and the distribution it was drawn from."""

    tokens: Int64[Tensor, " rows"]
    """NO_TOKEN where none could be drafted: such a place counts as rejected, for p to draw from."""
    weights: Float32[Tensor, "rows padded"]
    """Unnormalised q on this shard, after temperature, top-k and top-p; no columns if greedy."""
    total: Float64[Tensor, " rows"]
    """Sum of the weights over all shards; means nothing if greedy."""


@torch.no_grad()
def propose(
    local_logits: Float[Tensor, "rows vocab_local"],
    uniforms: Float64[Tensor, " rows"],
    params: SamplingParams,
    *,
    vocab_start: int,
    vocab_size: int,
    group: ProcessGroup | None = None,
) -> Proposal:
    """Draft one token per row, as `sample_tokens` would choose it, the same on every rank."""
    shard = VocabularyShard(vocab_start, vocab_size, group)
    if params.greedy:
        tokens, _ = largest_tokens(local_logits, params.temperature, shard)
        unused = torch.zeros((tokens.shape[0], 0), device=tokens.device)
        return Proposal(tokens, unused, unused.sum(dim=1, dtype=torch.float64))
    draft = Distribution.from_logits(local_logits, params, shard)
    tokens, _ = draft.draw(uniforms, shard)
    return Proposal(tokens, draft.weights, draft.total)


@torch.no_grad()
def verify(
    local_logits: Float[Tensor, "rows width vocab_local"],
    proposals: Sequence[Proposal],
    uniforms: Float64[Tensor, "rows width 2"],
    params: SamplingParams,
    *,
    vocab_start: int,
    vocab_size: int,
    group: ProcessGroup | None = None,
) -> tuple[Int64[Tensor, "rows width"], Float32[Tensor, "rows width"]]:
    """The drafts that the full model accepts and one token of its own, with log-probs under p.

    `local_logits[:, i]` are the full model's after i drafts, for `width - 1` proposals;
    `uniforms[:, i, 0]` decides on draft i, `uniforms[:, i, 1]` draws what is emitted in its place
    (or after the last). Both must be independent of what drew the drafts.

    Each row holds n accepted drafts, one token more, then NO_TOKEN with log-prob 0. Log-probs are
    in nats under the target distribution p, not under the residual. Greedy accepts while the
    draft is the target's choice, so its tokens are plain greedy decoding's.

    Where the target's row at the place of the next token makes no distribution (see
    `sample_tokens`), there and behind it stand NO_TOKEN and NaN on every rank.
    """
    shard = VocabularyShard(vocab_start, vocab_size, group)
    num_rows, width, _ = local_logits.shape
    if len(proposals) != width - 1:
        raise ValueError(f"{width} positions verify {width - 1} drafts, found {len(proposals)}")
    drafts = torch.stack(
        [proposal.tokens for proposal in proposals]
        + [torch.full((num_rows,), NO_TOKEN, device=local_logits.device)],
        dim=1,
    )
    flat_logits = local_logits.flatten(0, 1)
    if params.greedy:
        flat_tokens, flat_logprobs = largest_tokens(flat_logits, params.temperature, shard)
        tokens, logprobs = flat_tokens.view(num_rows, width), flat_logprobs.view(num_rows, width)
        accepted = (tokens == drafts) & (tokens != NO_TOKEN)
        return _cut(tokens, logprobs, _num_leading(accepted))
    target = Distribution.from_logits(flat_logits, params, shard)
    accepted, logprobs = _judge(target, drafts, proposals, uniforms[:, :, 0], shard)
    num_accepted = _num_leading(accepted)
    last, last_logprobs = _draw_last(target, num_accepted, proposals, uniforms[:, :, 1], shard)
    at_last = torch.arange(width, device=drafts.device) == num_accepted[:, None]
    tokens = torch.where(at_last, last[:, None], drafts)
    return _cut(tokens, torch.where(at_last, last_logprobs[:, None], logprobs), num_accepted)


def _judge(
    target: Distribution,
    drafts: Int64[Tensor, "rows width"],
    proposals: Sequence[Proposal],
    uniforms: Float64[Tensor, "rows width"],
    shard: VocabularyShard,
) -> tuple[Bool[Tensor, "rows width"], Float32[Tensor, "rows width"]]:
    """Whether each draft passes for itself, and its log-prob under p; NO_TOKEN never passes."""
    num_rows, width = drafts.shape
    num_real = target.logits.shape[1]
    column = drafts - shard.vocab_start
    mine = (drafts != NO_TOKEN) & (column >= 0) & (column < num_real)
    column = column.clamp(min=0, max=max(num_real - 1, 0))
    flat = column.flatten()[:, None]
    target_weight = target.weights.gather(1, flat).view(num_rows, width)
    logit = torch.zeros_like(target_weight)
    if num_real:
        logit = target.logits.gather(1, flat).view(num_rows, width)
    draft_weight = torch.zeros_like(target_weight)
    draft_total = target.total.new_ones(num_rows, width)
    for place, proposal in enumerate(proposals):
        draft_weight[:, place] = proposal.weights.gather(1, column[:, place, None])[:, 0]
        draft_total[:, place] = proposal.total
    found = torch.stack([target_weight, draft_weight, logit]).to(torch.float64)
    target_weight, draft_weight, logit = shard.reduce(torch.where(mine, found, 0.0), ReduceOp.SUM)
    # u < p(x) / q(x), without a division: totals are positive where there is a distribution.
    total = target.total.view(num_rows, width)
    accepted = uniforms * draft_weight * total < target_weight * draft_total
    accepted &= ~target.broken.view(num_rows, width) & (drafts != NO_TOKEN)
    every = torch.arange(num_rows * width, device=drafts.device)
    return accepted, target.logprobs(every, logit.flatten()).float().view(num_rows, width)


def _draw_last(
    target: Distribution,
    num_accepted: Int64[Tensor, " rows"],
    proposals: Sequence[Proposal],
    uniforms: Float64[Tensor, "rows width"],
    shard: VocabularyShard,
) -> tuple[Int64[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """The token after the accepted drafts: from the residual, or from p where there is none."""
    num_rows, width = uniforms.shape
    rows = torch.arange(num_rows, device=uniforms.device)
    if not proposals:
        return target.draw(uniforms[:, 0], shard)
    uniforms = uniforms[rows, num_accepted]
    here = rows * width + num_accepted
    total = target.total[here]
    rejected = num_accepted.clamp(max=width - 2)
    drafted = torch.stack([proposal.tokens for proposal in proposals])[rejected, rows] != NO_TOKEN
    draft_total = torch.stack([proposal.total for proposal in proposals])[rejected, rows]
    # In units of p's weights, and in place, for it is as large as the vocabulary.
    residual = torch.stack([proposal.weights for proposal in proposals])[rejected, rows]
    residual.mul_(-(total / draft_total).float()[:, None])
    residual.add_(target.weights[here]).clamp_(min=0.0)
    masses = block_sums(residual)
    residual_total = shard.reduce(masses.sum(dim=1, dtype=torch.float64), ReduceOp.SUM)
    from_residual = residual_total > _SMALLEST_RESIDUAL * total
    from_residual &= drafted & (num_accepted < width - 1)
    masses = torch.where(from_residual[:, None], masses, target.block_masses[here])
    speed, block = race_blocks(masses, uniforms, shard)
    inside = torch.where(
        from_residual[:, None],
        take_block(residual, rows, block),
        take_block(target.weights, here, block),
    )
    column = race_inside(inside, block, uniforms, shard)
    return target.announce(here, speed, column, shard)


def _num_leading(accepted: Bool[Tensor, "rows width"]) -> Int64[Tensor, " rows"]:
    """How many drafts were accepted before the first that was not; at most `width - 1`."""
    width = accepted.shape[1]
    return accepted[:, : width - 1].to(torch.int64).cumprod(dim=1).sum(dim=1)


def _cut(
    tokens: Int64[Tensor, "rows width"],
    logprobs: Float32[Tensor, "rows width"],
    num_accepted: Int64[Tensor, " rows"],
) -> tuple[Int64[Tensor, "rows width"], Float32[Tensor, "rows width"]]:
    """Leave nothing behind the last token; NaN there if that token could not be chosen."""
    behind = torch.arange(tokens.shape[1], device=tokens.device) > num_accepted[:, None]
    failed = tokens.gather(1, num_accepted[:, None]) == NO_TOKEN
    nothing = torch.where(failed, torch.nan, 0.0).to(logprobs.dtype)
    return tokens.masked_fill(behind, NO_TOKEN), torch.where(behind, nothing, logprobs)
