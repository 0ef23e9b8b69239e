"""Edges of drafting and checking: equal models, rows without a distribution, no drafts."""

from dataclasses import replace

import pytest
import torch
from sampling_cases import assert_drawn_from, numbers, truncated
from speculation_cases import Tables, random_tables, speculate

from nested_reft_mcore.rollout.sampling import NO_TOKEN, sample_tokens
from nested_reft_mcore.rollout.speculation import propose, verify
from nested_reft_mcore.rollout.types import SamplingParams

PLAIN = SamplingParams(1)


def test_equal_models_accept_everything() -> None:
    tables = random_tables(300, seed=0)
    tables = Tables(tables.full, tables.full)
    tokens, _, proposals = speculate(tables, torch.full((2000,), 300), 3, PLAIN, key=0)
    assert (tokens != NO_TOKEN).all()
    assert tokens[:, :3].equal(torch.stack([proposal.tokens for proposal in proposals], dim=1))


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6])
def test_a_residual_that_is_rounding_is_replaced_by_the_target(noise) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, generator=generator) * 2
    noisy = logits + noise * torch.randn(300, generator=generator)
    num = 20_000
    proposal = propose(noisy.expand(num, -1), numbers(num, 0), PLAIN, vocab_start=0, vocab_size=300)
    uniforms = numbers(num * 4, 1).view(num, 2, 2)
    uniforms[:, :, 0] = 1.0  # Rejects what rounding made a little less likely, and equals too.
    tokens, logprobs = verify(
        logits.expand(num, 2, -1), [proposal], uniforms, PLAIN, vocab_start=0, vocab_size=300
    )
    rejected = tokens[:, 1] == NO_TOKEN
    assert rejected.sum() > num / 4
    assert_drawn_from(tokens[rejected, 0], logits.double().softmax(0))
    assert logprobs.isfinite().all()


def test_without_drafts_a_token_is_drawn_as_ever() -> None:
    logits = torch.randn(50, 1, 300)
    uniforms = numbers(100).view(50, 1, 2)
    place = {"vocab_start": 0, "vocab_size": 300}
    tokens, logprobs = verify(logits, [], uniforms, PLAIN, **place)
    expected = sample_tokens(logits[:, 0], uniforms[:, 0, 1], PLAIN, **place)
    assert tokens[:, 0].equal(expected[0])
    assert logprobs[:, 0].equal(expected[1])


def test_a_wrong_number_of_drafts_is_refused() -> None:
    uniforms = torch.zeros(1, 3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="3 positions verify 2 drafts, found 0"):
        verify(torch.zeros(1, 3, 8), [], uniforms, PLAIN, vocab_start=0, vocab_size=8)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("broken_place", [0, 1, 2])
def test_a_target_without_a_distribution_ends_its_row_there(greedy, broken_place) -> None:
    params = SamplingParams(1, greedy=greedy)
    tables = random_tables(6, seed=3)
    tables = Tables(tables.full, tables.full)  # Everything is accepted.
    contexts = torch.full((40, 3), 6)
    proposals = []
    for place in range(2):
        keys = numbers(40, 5, place)
        proposals.append(propose(tables.draft[contexts[:, place]], keys, params, **tables.place))
        contexts[:, place + 1] = proposals[-1].tokens
    uniforms = numbers(240, 6).view(40, 3, 2)
    logits = tables.full[contexts].clone()
    whole = verify(logits, proposals, uniforms, params, **tables.place)
    logits[::2, broken_place, 4] = torch.nan
    tokens, logprobs = verify(logits, proposals, uniforms, params, **tables.place)
    for got, expected in zip((tokens, logprobs), whole, strict=True):
        assert got[1::2].equal(expected[1::2]), "another row was disturbed"
        assert got[::2, :broken_place].equal(expected[::2, :broken_place])
    assert (tokens[::2, broken_place:] == NO_TOKEN).all()
    assert logprobs[::2, broken_place:].isnan().all()


def test_a_broken_place_that_is_not_reached_does_no_harm() -> None:
    tables = random_tables(6, seed=3)
    last = torch.full((400,), 6)
    proposal = propose(tables.draft[last], numbers(400, 1), PLAIN, **tables.place)
    logits = tables.full[torch.stack([last, proposal.tokens], dim=1)]
    uniforms = numbers(1600, 2).view(400, 2, 2)
    expected = verify(logits, [proposal], uniforms, PLAIN, **tables.place)
    logits = logits.clone()
    logits[:, 1] = torch.nan
    tokens, logprobs = verify(logits, [proposal], uniforms, PLAIN, **tables.place)
    rejected = expected[0][:, 1] == NO_TOKEN
    assert 50 < rejected.sum() < 350
    assert tokens[rejected].equal(expected[0][rejected])
    assert logprobs[rejected].equal(expected[1][rejected])
    assert logprobs[~rejected, 1].isnan().all()


@pytest.mark.parametrize(
    "params", [PLAIN, SamplingParams(1, top_k=3), SamplingParams(1, top_p=0.7)]
)
def test_a_draft_that_could_not_be_made_is_drawn_from_the_target(params) -> None:
    tables = random_tables(6, seed=4)
    num = 20_000
    last = torch.full((num,), 6)
    logits = tables.draft[last].clone()
    logits[::2, 1] = torch.nan
    first = propose(logits, numbers(num, 1), params, **tables.place)
    assert (first.tokens[::2] == NO_TOKEN).all()
    # A second draft behind it stands on nothing, and must not count.
    second = propose(tables.draft[last], numbers(num, 2), params, **tables.place)
    uniforms = numbers(num * 6, 3).view(num, 3, 2)
    contexts = torch.stack([last, first.tokens, second.tokens], dim=1)
    tokens, _ = verify(tables.full[contexts], [first, second], uniforms, params, **tables.place)
    assert (tokens[::2, 1:] == NO_TOKEN).all()
    assert (tokens[1::2, 1] != NO_TOKEN).any()
    law = truncated(tables.full[6], params)
    assert_drawn_from(tokens[::2, 0], law)
    assert_drawn_from(tokens[1::2, 0], law)


def test_a_draft_that_is_withheld_is_drawn_from_the_target() -> None:
    tables = random_tables(6, seed=4)
    last = torch.full((20_000,), 6)
    proposal = propose(tables.draft[last], numbers(20_000, 1), PLAIN, **tables.place)
    proposal = replace(proposal, tokens=torch.full_like(last, NO_TOKEN))
    uniforms = numbers(80_000, 2).view(20_000, 2, 2)
    logits = tables.full[last][:, None].expand(-1, 2, -1)
    tokens, _ = verify(logits, [proposal], uniforms, PLAIN, **tables.place)
    assert_drawn_from(tokens[:, 0], truncated(tables.full[6], PLAIN))


def test_greedy_rejects_a_missing_draft_at_a_broken_target() -> None:
    greedy = SamplingParams(1, greedy=True)
    logits = torch.full((1, 2, 6), torch.nan)
    proposal = propose(logits[:, 0], numbers(1), greedy, vocab_start=0, vocab_size=6)
    logits[:, 1] = 1.0
    uniforms = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    tokens, _ = verify(logits, [proposal], uniforms, greedy, vocab_start=0, vocab_size=6)
    assert tokens.tolist() == [[NO_TOKEN, NO_TOKEN]]


def test_a_row_does_not_depend_on_the_others() -> None:
    tables = random_tables(200, seed=8)
    params = SamplingParams(1, temperature=0.8, top_p=0.9)
    last = torch.arange(30)
    columns = [propose(tables.draft[last], numbers(30, 1), params, **tables.place)]
    logits = tables.full[torch.stack([last, columns[0].tokens], dim=1)]
    uniforms = numbers(120, 2).view(30, 2, 2)
    together = verify(logits, columns, uniforms, params, **tables.place)
    for row in range(30):
        one = slice(row, row + 1)
        alone = replace(
            columns[0],
            tokens=columns[0].tokens[one],
            weights=columns[0].weights[one],
            total=columns[0].total[one],
        )
        found = verify(logits[one], [alone], uniforms[one], params, **tables.place)
        assert found[0].equal(together[0][one])
        assert found[1].equal(together[1][one])
