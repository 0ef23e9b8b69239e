"""Drawing over a grid of uniform numbers gives every token its exact share."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.types import SamplingParams

GRID = 4096
VOCAB_SIZES = st.sampled_from([1, 2, 41, 128, 129, 300])


@st.composite
def logits_of(draw: st.DrawFn) -> Tensor:
    """`[vocab]`: normal numbers of some scale, rounded so that some of them tie."""
    vocab_size = draw(VOCAB_SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([0.0, 0.5, 3.0, 20.0]))
    digits = draw(st.sampled_from([0, 1, 6]))
    return (torch.randn(vocab_size, generator=generator) * scale).round(decimals=digits)


def enumerate_grid(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Share of the grid that each token got, and the probability that was reported for it."""
    vocab_size = len(logits)
    padding = torch.tensor([float("nan"), float("inf"), 1e30])
    rows = torch.cat([logits, padding]).expand(GRID, -1)
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens, logprobs = sample_tokens(rows, uniforms, params, vocab_start=0, vocab_size=vocab_size)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < vocab_size, "padding was sampled"
    reported = torch.zeros(vocab_size, dtype=torch.float64)
    reported[tokens] = logprobs.double().exp()
    return torch.bincount(tokens, minlength=vocab_size) / GRID, reported


def reporting_tolerance(logits: Tensor, params: SamplingParams) -> float:
    """Relative error of a probability whose logits were divided and compared in float32."""
    largest = float((logits / params.temperature).abs().max())
    return 1e-6 + 2 * torch.finfo(torch.float32).eps * largest


def truncated(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution by definition: walk down the distinct logits until there is enough."""
    scaled = logits / params.temperature
    weights = (scaled - scaled.max()).exp().double()
    if params.top_k is not None:
        weights = keep_enough(scaled, weights, torch.ones_like(weights), params.top_k)
    if params.top_p is not None:
        weights = keep_enough(scaled, weights, weights / weights.sum(), params.top_p)
    return weights / weights.sum()


def keep_enough(scaled: Tensor, weights: Tensor, measure: Tensor, needed: float) -> Tensor:
    """The weights of the largest logits whose measure is at least `needed`; zero elsewhere."""
    for value in scaled.unique().flip(0):
        if measure[scaled >= value].sum() >= needed:
            return torch.where(scaled >= value, weights, 0.0)
    return weights


@given(logits_of(), st.sampled_from([0.3, 1.0, 1.7]))
def test_shares_and_reports_are_the_softmax(logits: Tensor, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=1, temperature=temperature)
    shares, reported = enumerate_grid(logits, params)
    exact = (logits.double() / temperature).softmax(0)
    # An interval of length p holds p * GRID points of the grid, give or take one.
    assert (shares - exact).abs().max() <= 1.01 / GRID + 1e-6
    drawn = shares > 0
    rtol = reporting_tolerance(logits, params)
    torch.testing.assert_close(reported[drawn], exact[drawn], rtol=rtol, atol=0)


@settings(max_examples=60)
@given(
    logits_of(),
    st.sampled_from([0.5, 1.0]),
    st.one_of(st.none(), st.integers(1, 400)),
    st.one_of(st.none(), st.floats(0.01, 0.995)),
)
def test_truncation_keeps_the_right_tokens_and_renormalises(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    params = SamplingParams(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    shares, reported = enumerate_grid(logits, params)
    exact = truncated(logits, params)
    assert (shares - exact).abs().max() <= 1.01 / GRID + 1e-6
    drawn = shares > 0
    rtol = reporting_tolerance(logits, params)
    torch.testing.assert_close(reported[drawn], exact[drawn], rtol=rtol, atol=0)


@settings(max_examples=20)
@given(logits_of(), st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(logits: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = logits[None] + torch.randn(5, 1, generator=generator)
    uniforms = torch.rand(5, dtype=torch.float64, generator=generator)
    params = SamplingParams(max_new_tokens=1, top_p=0.9)
    keywords = {"vocab_start": 0, "vocab_size": len(logits)}
    together = sample_tokens(rows, uniforms, params, **keywords)
    for row in range(5):
        alone = sample_tokens(rows[row : row + 1], uniforms[row : row + 1], params, **keywords)
        assert alone[0] == together[0][row]
        assert alone[1] == together[1][row]
