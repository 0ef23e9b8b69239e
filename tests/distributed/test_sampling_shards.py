"""Sampling from shards of the vocabulary equals sampling from the whole, on real processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from run_workers import run_workers

from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.types import SamplingParams

NUM_RANKS = 3
CASES = {
    "plain": SamplingParams(1, temperature=0.7),
    "greedy": SamplingParams(1, greedy=True),
    "top_k": SamplingParams(1, top_k=20),
    "top_p": SamplingParams(1, temperature=1.3, top_p=0.8),
    "both": SamplingParams(1, top_k=50, top_p=0.9),
}
VOCABULARIES = ((41, 128), (300, 128), (130, 256))
"""(real ids, ids of a shard): the first and the last leave whole shards to padding."""


def whole_case(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with ties across shards, and uniform numbers over all of [0, 1)."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(400, vocab_size, generator=generator) * 2).round(decimals=1)
    return logits, (torch.arange(400, dtype=torch.float64) + 0.5) / 400


def sample_whole(vocab_size: int, params: SamplingParams) -> tuple[list[int], list[float]]:
    logits, uniforms = whole_case(vocab_size)
    tokens, logprobs = sample_tokens(logits, uniforms, params, vocab_start=0, vocab_size=vocab_size)
    return tokens.tolist(), logprobs.tolist()


def sample_shards(ranks: RankInfo) -> dict[str, tuple[list[int], list[float]]]:
    """Every case from this rank's shard, whose padding is NaN."""
    dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
    results = {}
    for vocab_size, shard_size in VOCABULARIES:
        logits, uniforms = whole_case(vocab_size)
        padded = torch.full((len(logits), shard_size * NUM_RANKS), float("nan"))
        padded[:, :vocab_size] = logits
        start = ranks.rank * shard_size
        for name, params in CASES.items():
            tokens, logprobs = sample_tokens(
                padded[:, start : start + shard_size],
                uniforms,
                params,
                vocab_start=start,
                vocab_size=vocab_size,
                group=dist.group.WORLD,
            )
            results[f"{name}/{vocab_size}"] = (tokens.tolist(), logprobs.tolist())
    dist.destroy_process_group()
    return results


@pytest.mark.distributed
def test_shards_equal_the_whole() -> None:
    per_rank = run_workers(sample_shards, NUM_RANKS)
    for results in per_rank:
        assert results == per_rank[0], "ranks disagree"
    for vocab_size, _ in VOCABULARIES:
        for name, params in CASES.items():
            tokens, logprobs = per_rank[0][f"{name}/{vocab_size}"]
            expected_tokens, expected_logprobs = sample_whole(vocab_size, params)
            assert tokens == expected_tokens, name
            assert logprobs == pytest.approx(expected_logprobs, rel=0, abs=1e-6), name
            assert len(set(tokens)) > 1, name
