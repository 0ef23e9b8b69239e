"""Sampling and speculation on shards of the vocabulary equal those on the whole, on processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from run_workers import run_workers
from sampling_cases import assert_drawn_from, numbers, truncated
from speculation_cases import Tables, generate, random_tables, speculate

from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.rollout.sampling import NO_TOKEN, sample_tokens
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


def sample_shards(ranks: RankInfo) -> dict[str, Any]:
    """Every case from this rank's shard, whose padding is NaN; then what two ranks do alone."""
    dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
    two = dist.new_group([0, 1])
    results: dict[str, Any] = {}
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
    results["broken"] = {name: sample_broken(ranks.rank, params) for name, params in CASES.items()}
    results["speculation"] = {
        name: speculate_shards(params, ranks.rank * 128, ranks.rank * 128 + 128, dist.group.WORLD)
        for name, params in CASES.items()
    }
    if ranks.rank < 2:
        results["drawn"] = {name: draw_many(ranks.rank, p, two) for name, p in CASES.items()}
    dist.destroy_process_group()
    return results


def sample_broken(rank: int, params: SamplingParams) -> tuple[list[int], list[float]]:
    """Rows 0, 1, 2 are broken by the shard of that number, row 3 by none, row 4 by all."""
    logits, uniforms = whole_case(300)
    logits = torch.cat([logits, torch.full((400, 84), torch.nan)], dim=1)[:5]
    logits[rank, rank * 128 + 5] = torch.inf if rank == 1 else torch.nan
    logits[4, :300] = -torch.inf
    tokens, logprobs = sample_tokens(
        logits[:, rank * 128 : rank * 128 + 128],
        uniforms[:5],
        params,
        vocab_start=rank * 128,
        vocab_size=300,
        group=dist.group.WORLD,
    )
    return tokens.tolist(), logprobs.tolist()


def speculate_shards(
    params: SamplingParams, start: int, stop: int, group: dist.ProcessGroup | None
) -> tuple[list[list[int]], list[list[float]]]:
    """One round of 200 rows from a vocabulary of 300."""
    tables = random_tables(300, seed=2)
    tables = Tables(tables.full, tables.full + 0.4 * tables.draft, start, stop, group)
    tokens, logprobs, _ = speculate(tables, torch.arange(200), 3, params, key=1)
    return tokens.tolist(), logprobs.tolist()


def draw_many(rank: int, params: SamplingParams, group: dist.ProcessGroup) -> dict[str, list]:
    """20,000 draws of a vocabulary of 5 of which rank 0 has 3; the same by speculation."""
    tables = random_tables(5, seed=7)
    cut = slice(3) if rank == 0 else slice(3, 5)
    tables = Tables(tables.full, tables.draft, cut.start or 0, cut.stop, group)
    rows = tables.full[-1, cut].expand(20_000, -1)
    tokens, _ = sample_tokens(rows, numbers(20_000, 1), params, **tables.place)
    pairs, _ = generate(tables, 20_000, 2, 2, params)
    return {"tokens": tokens.tolist(), "pairs": (pairs[:, 0] * 5 + pairs[:, 1]).tolist()}


@pytest.mark.distributed
def test_shards_equal_the_whole() -> None:
    per_rank = run_workers(sample_shards, NUM_RANKS)
    drawn = [results.pop("drawn", None) for results in per_rank]
    broken = [results.pop("broken") for results in per_rank]
    speculated = [results.pop("speculation") for results in per_rank]
    for results in per_rank:
        assert results == per_rank[0], "ranks disagree"
    for vocab_size, _ in VOCABULARIES:
        for name, params in CASES.items():
            tokens, logprobs = per_rank[0][f"{name}/{vocab_size}"]
            expected_tokens, expected_logprobs = sample_whole(vocab_size, params)
            assert tokens == expected_tokens, name
            assert logprobs == pytest.approx(expected_logprobs, rel=0, abs=1e-6), name
            assert len(set(tokens)) > 1, name
    for name, params in CASES.items():
        check_broken([results[name] for results in broken], params)
        check_speculated([results[name] for results in speculated], params)
        assert drawn[0][name] == drawn[1][name], "ranks disagree"
        law = random_tables(5, seed=7).full
        law = torch.stack([truncated(row, params) for row in law])
        assert_drawn_from(torch.tensor(drawn[0][name]["tokens"]), law[-1])
        assert_drawn_from(
            torch.tensor(drawn[0][name]["pairs"]), (law[-1][:, None] * law[:-1]).flatten()
        )


def check_broken(per_rank: list[tuple[list[int], list[float]]], params: SamplingParams) -> None:
    expected_tokens, expected_logprobs = sample_whole(300, params)
    for tokens, logprobs in per_rank:
        assert tokens == [NO_TOKEN] * 3 + [expected_tokens[3], NO_TOKEN]
        assert [math.isnan(number) for number in logprobs] == [True] * 3 + [False, True]
        assert logprobs[3] == pytest.approx(expected_logprobs[3], rel=0, abs=1e-6)


def check_speculated(
    per_rank: list[tuple[list[list[int]], list[list[float]]]], params: SamplingParams
) -> None:
    expected_tokens, expected_logprobs = speculate_shards(params, 0, 300, None)
    for tokens, logprobs in per_rank:
        assert tokens == expected_tokens
        for got, expected in zip(logprobs, expected_logprobs, strict=True):
            assert got == pytest.approx(expected, rel=0, abs=2e-6)
    lengths = [sum(token != NO_TOKEN for token in row) for row in expected_tokens]
    assert set(lengths) == {1, 2, 3, 4}, "some outcome was not met"
