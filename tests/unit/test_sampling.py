"""Single cases of sampling that a distribution test would not pin down."""

import pytest
import torch

from nested_reft_mcore.rollout.sampling import sample_tokens
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
    tokens, logprobs = sample([[1.0, 3.0, 1.0, 0.0]] * 2, [0.0, 0.9999], top_k=2)
    assert tokens.tolist() == [0, 2]
    torch.testing.assert_close(
        logprobs, torch.tensor([1.0, 3.0, 1.0]).log_softmax(0)[[0, 2]], rtol=0, atol=1e-6
    )


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
    tokens, _ = sample([[-0.0, 0.0, -5.0]] * 2, [0.1, 0.9], top_k=1)
    assert tokens.tolist() == [0, 1]


def test_the_largest_uniform_never_leaves_the_support() -> None:
    logits = torch.full((1, 300), -float("inf"))
    logits[0, [3, 140, 141]] = torch.tensor([0.1, 0.7, 0.3])
    below_one = 1.0 - 2.0**-53
    tokens, _ = sample(logits.tolist(), [below_one])
    assert tokens.tolist() == [141]
    tokens, _ = sample(logits.tolist(), [0.0])
    assert tokens.tolist() == [3]


def test_a_shard_that_is_all_padding_chooses_nothing_of_its_own() -> None:
    # Alone it has no real id at all: whatever comes back must not read the padding.
    _, logprobs = sample([[5.0, 6.0]], [0.5], vocab_start=10, vocab_size=10)
    assert not torch.isfinite(logprobs).any()


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


def test_draws_next_to_a_boundary_of_a_real_vocabulary_fall_on_the_right_side() -> None:
    # Boundaries of the exact distribution, 2e-8 to either side: a float32 sum is off by far more.
    logits = torch.randn(49_152, generator=torch.Generator().manual_seed(1))
    exact = logits.double().softmax(0)
    wide = (exact > 2e-6).nonzero()[:, 0]
    ids = wide[torch.linspace(100, len(wide) - 2, 60).long()]
    starts = exact.cumsum(0)[ids] - exact[ids]
    uniforms = torch.cat([starts - 2e-8, starts + 2e-8])
    params = SamplingParams(max_new_tokens=1)
    rows = logits.expand(120, -1)
    tokens, _ = sample_tokens(rows, uniforms, params, vocab_start=0, vocab_size=49_152)
    assert (tokens[60:] == ids).all()
    assert (tokens[:60] == ids - 1).all()
    naive = logits.softmax(0).cumsum(0)
    assert (torch.searchsorted(naive, uniforms[60:].float(), right=True) != ids).sum() > 10


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
