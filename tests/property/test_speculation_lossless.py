"""What comes out of drafting and checking has the law of the full model, whatever drafts."""

from dataclasses import replace

import pytest
import torch
from sampling_cases import assert_drawn_from, numbers
from speculation_cases import Tables, generate, random_tables, speculate, total_variation

from nested_reft_mcore.rollout.sampling import NO_TOKEN
from nested_reft_mcore.rollout.speculation import propose, verify
from nested_reft_mcore.rollout.types import SamplingParams

NUM_ROWS = 50_000
CASES = {
    "plain": SamplingParams(1),
    "cold": SamplingParams(1, temperature=0.6),
    "hot": SamplingParams(1, temperature=2.5),
    "top_k": SamplingParams(1, top_k=3),
    "top_p": SamplingParams(1, temperature=0.8, top_p=0.8),
    "both": SamplingParams(1, top_k=4, top_p=0.9),
}


@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("vocab_size", "num_drafts"), [(3, 1), (5, 3)])
def test_one_token_and_two_have_the_law_of_the_full_model(params, vocab_size, num_drafts) -> None:
    tables = random_tables(vocab_size, seed=vocab_size)
    p, q = tables.laws(params)
    tokens, logprobs = generate(tables, NUM_ROWS, 2, num_drafts, params)
    pair = tokens[:, 0] * vocab_size + tokens[:, 1]
    assert_drawn_from(tokens[:, 0], p[-1])
    assert_drawn_from(pair, (p[-1][:, None] * p[:-1]).flatten())
    shares = torch.bincount(pair, minlength=vocab_size**2) / NUM_ROWS
    # The mean of |share - p| is below sqrt(p / n), so this is what sampling noise may make.
    noise = vocab_size / NUM_ROWS**0.5
    assert total_variation(shares, (p[-1][:, None] * p[:-1]).flatten()) < noise
    assert total_variation(shares, (q[-1][:, None] * q[:-1]).flatten()) > 4 * noise
    context = torch.stack([torch.full_like(tokens[:, 0], vocab_size), tokens[:, 0]], dim=1)
    torch.testing.assert_close(logprobs.double(), p[context, tokens].log(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
def test_drafts_are_accepted_as_often_as_the_laws_overlap(params) -> None:
    tables = random_tables(4, seed=11)
    p, q = tables.laws(params)
    overlap = torch.minimum(p, q).sum(1)
    for prefix in range(5):
        last = torch.full((NUM_ROWS,), prefix)
        tokens, _, proposals = speculate(tables, last, 2, params, key=prefix)
        num_accepted = (tokens != NO_TOKEN).sum(1) - 1
        check_share(num_accepted >= 1, overlap[prefix])
        assert_drawn_from(proposals[0].tokens, q[prefix])
        for second in range(4):
            reached = (num_accepted >= 1) & (tokens[:, 0] == second)
            if reached.sum() > 100:
                check_share(num_accepted[reached] == 2, overlap[second])


def check_share(happened: torch.Tensor, probability: torch.Tensor) -> None:
    probability = float(probability)
    deviation = (probability * (1 - probability) / len(happened)) ** 0.5
    # Six deviations, and what float32 makes of a probability of one.
    assert abs(float(happened.double().mean()) - probability) <= 6 * deviation + 1e-6


@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("seed", range(3))
def test_exact_enumeration_of_one_check(params, seed) -> None:
    """Every draft, both sides of its acceptance threshold, the law of what replaces it."""
    tables = random_tables(5, seed=seed)
    p, q = (law[-1] for law in tables.laws(params))
    acceptance = torch.where(q > 0, p / q, 0.0).clamp(max=1)
    emitted = torch.zeros(5, dtype=torch.float64)
    for draft in q.nonzero()[:, 0].tolist():
        threshold = float(acceptance[draft])
        just_below, just_above = threshold * (1 - 1e-5), threshold * (1 + 1e-5)
        if threshold > 0:
            tokens, _ = check_draft(tables, draft, just_below, params, num=1)
            assert tokens[0, 0] == draft, "not accepted"
            assert tokens[0, 1] != NO_TOKEN
        emitted[draft] += q[draft] * threshold
        if just_above < 1:
            tokens, _ = check_draft(tables, draft, just_above, params, num=20_000)
            residual = (p - q).clamp(min=0)
            assert_drawn_from(tokens[:, 0], residual / residual.sum())
            assert (tokens[:, 1] == NO_TOKEN).all()
            emitted += q[draft] * (1 - threshold) * residual / residual.sum()
    # With the thresholds and residuals that were just checked, the law is p.
    torch.testing.assert_close(emitted, p, rtol=0, atol=1e-12)


def check_draft(tables: Tables, draft: int, acceptance: float, params: SamplingParams, num: int):
    """Verify `num` rows that all drafted this token, with this number deciding on it."""
    last = torch.full((num,), tables.vocab_size)
    proposal = propose(tables.draft[last], numbers(num, 7), params, **tables.place)
    proposal = replace(proposal, tokens=torch.full((num,), draft))
    contexts = torch.stack([last, proposal.tokens], dim=1)
    uniforms = torch.stack([numbers(num, 8), numbers(num, 9)], dim=1)[:, :, None].repeat(1, 1, 2)
    uniforms[:, :, 0] = acceptance
    return verify(tables.full[contexts], [proposal], uniforms, params, **tables.place)


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("likeness", ["other", "same"])
def test_greedy_is_plain_greedy_decoding(num_drafts, likeness) -> None:
    tables = random_tables(40, seed=5)
    full = tables.full.round(decimals=1)  # ties
    tables = Tables(full, full if likeness == "same" else full + 0.8 * tables.draft)
    tokens, logprobs = generate(tables, 1, 30, num_drafts, SamplingParams(1, greedy=True))
    last = 40
    for token, logprob in zip(tokens[0].tolist(), logprobs[0].tolist(), strict=True):
        assert token == int(full[last].argmax())
        assert logprob == pytest.approx(float(full[last].log_softmax(0)[token]), abs=1e-5)
        last = token
