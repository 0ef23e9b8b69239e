"""Single cases of sampling that a distribution test would not pin down."""

import pytest
import torch
from sampling_cases import assert_drawn_from, numbers

from nested_reft_mcore.rollout.sampling import NO_TOKEN, sample_tokens
from nested_reft_mcore.rollout.types import SamplingParams


def sample(logits, uniforms, vocab_start=0, vocab_size=None, **params):
    return sample_tokens(
        torch.as_tensor(logits, dtype=torch.float32),
        torch.as_tensor(uniforms, dtype=torch.float64),
        SamplingParams(max_new_tokens=1, **params),
        vocab_start=vocab_start,
        vocab_size=len(logits[0]) if vocab_size is None else vocab_size,
    )


def test_greedy_takes_the_lowest_id_of_a_tie_and_reports_the_whole_softmax() -> None:
    logits = [[0.0, 2.0, 2.0, -1.0]]
    tokens, logprobs = sample(logits, [0.99], greedy=True, temperature=0.5, top_k=1)
    assert tokens.tolist() == [1]
    expected = (torch.tensor(logits) / 0.5).log_softmax(dim=1)[:, 1]
    torch.testing.assert_close(logprobs, expected)


def test_top_k_keeps_ties_with_the_last_token_kept() -> None:
    tokens, logprobs = sample([[1.0, 3.0, 1.0, 0.0]] * 200, numbers(200), top_k=2)
    assert tokens.unique().tolist() == [0, 1, 2]
    expected = torch.tensor([1.0, 3.0, 1.0]).log_softmax(0)[tokens]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.500001, 2), (0.75, 2), (1.0, 4)]
)
def test_top_p_keeps_the_fewest_tokens_with_the_mass(top_p: float, kept: int) -> None:
    # Halves are exact in float32, so the boundary cases are too.
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None].expand(64, -1)
    tokens, logprobs = sample(logits.tolist(), torch.arange(64) / 64, top_p=top_p)
    assert sorted(set(tokens.tolist())) == list(range(kept))
    mass = [0.5, 0.75, 0.875, 1.0][kept - 1]
    probability = logits[0].exp()[tokens] / mass
    torch.testing.assert_close(logprobs.exp(), probability)


def test_negative_zero_ties_with_zero() -> None:
    tokens, _ = sample([[-0.0, 0.0, -5.0]] * 50, numbers(50), top_k=1)
    assert tokens.unique().tolist() == [0, 1]


def test_draws_never_leave_the_support() -> None:
    logits = torch.full((1, 300), -float("inf"))
    logits[0, [3, 140, 141]] = torch.tensor([0.1, 0.7, 0.3])
    keys = torch.cat([numbers(200), torch.tensor([0.0, 1.0 - 2.0**-53])])
    tokens, _ = sample(logits.expand(len(keys), -1).tolist(), keys)
    assert tokens.unique().tolist() == [3, 140, 141]


BROKEN = {
    "nan": lambda row: row.index_fill_(0, torch.tensor([7]), torch.nan),
    "plus infinity": lambda row: row.index_fill_(0, torch.tensor([7]), torch.inf),
    "minus infinity": lambda row: row.fill_(-torch.inf),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize(
    "params", [{}, {"greedy": True}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.3}], ids=str
)
def test_a_row_without_a_distribution_gets_no_token_and_disturbs_nobody(what, params) -> None:
    # Minus infinity is a fine logit, and padding may hold anything.
    rows = torch.randn(6, 200, generator=torch.Generator().manual_seed(4))
    rows[:, 3] = -torch.inf
    rows[:, 190:] = torch.tensor([torch.nan, torch.inf] * 5)
    expected_tokens, expected_logprobs = sample(rows, numbers(6), vocab_size=190, **params)
    for row in (1, 4):
        BROKEN[what](rows[row])
    tokens, logprobs = sample(rows, numbers(6), vocab_size=190, **params)
    healthy = torch.tensor([True, False, True, True, False, True])
    assert (tokens[~healthy] == NO_TOKEN).all()
    assert logprobs[~healthy].isnan().all()
    assert tokens[healthy].equal(expected_tokens[healthy])
    assert logprobs[healthy].equal(expected_logprobs[healthy])
    assert (expected_tokens >= 0).all()
    assert expected_logprobs.isfinite().all()


def test_huge_logits_do_not_overflow_at_a_low_temperature() -> None:
    tokens, logprobs = sample([[3e38, 1e38, -3e38]], [0.5], temperature=0.01)
    assert tokens.tolist() == [0]
    assert logprobs.tolist() == [0.0]


def test_a_shard_that_is_all_padding_chooses_nothing_of_its_own() -> None:
    # Alone it has no real id at all: whatever comes back must not read the padding.
    for greedy in (False, True):
        tokens, logprobs = sample([[5.0, 6.0]], [0.5], vocab_start=10, vocab_size=10, greedy=greedy)
        assert tokens.tolist() == [NO_TOKEN]
        assert logprobs.isnan().all()


def test_bfloat16_logits_are_read_as_float32() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = SamplingParams(max_new_tokens=1, temperature=0.7)
    uniforms = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        tokens, logprobs = sample_tokens(
            logits.to(dtype), uniforms, params, vocab_start=0, vocab_size=50
        )
        expected = (logits.float() / 0.7).log_softmax(1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected)


def test_rounding_of_the_logits_changes_hardly_a_draw() -> None:
    # What another layout makes of the same sums, or somewhat more; 60,000 draws.
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3000, 512, generator=generator) * 3
    noisy = logits + 3e-5 * torch.randn(logits.shape, generator=generator)
    num_changed = num_naive = 0
    for repeat in range(20):
        keys = numbers(3000, repeat)
        one, other = sample(logits, keys)[0], sample(noisy, keys)[0]
        num_changed += int((one != other).sum())
        cdfs = [rows.softmax(1).cumsum(1) for rows in (logits, noisy)]
        one, other = (torch.searchsorted(cdf, keys.float()[:, None]) for cdf in cdfs)
        num_naive += int((one != other).sum())
    assert num_changed <= 6, "more than 1 in 10,000"
    assert num_naive > 12, "the noise is too small to tell anything"


def test_a_real_vocabulary_keeps_its_law_and_its_accuracy() -> None:
    logits = torch.randn(49_152, generator=torch.Generator().manual_seed(1)) * 3
    exact = logits.double().softmax(0)
    tokens, logprobs = sample(logits.expand(4000, -1), numbers(4000), vocab_size=49_152)
    assert_drawn_from(tokens, exact)
    assert (logprobs.double() - exact[tokens].log()).abs().max() < 1e-6
    # Blocks are 128 ids: how draws spread over them, and over places inside of them.
    assert_drawn_from(tokens // 128, exact.view(-1, 128).sum(1))
    assert_drawn_from(tokens % 128, exact.view(-1, 128).sum(0))


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(2, 300)
    before = logits.clone()
    for params in ({}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}, {"greedy": True}):
        sample(logits, [0.3, 0.4], **params)
    assert logits.equal(before), "logits were overwritten"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_parameters_that_make_no_distribution_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_new_tokens": 1, **change})
