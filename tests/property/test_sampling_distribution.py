"""Draws follow the distribution that the definition gives, and report its probabilities."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import assert_drawn_from, numbers, truncated
from torch import Tensor

from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.types import SamplingParams

NUM_DRAWS = 4096
VOCAB_SIZES = st.sampled_from([1, 2, 41, 128, 129, 300])


@st.composite
def logits_of(draw: st.DrawFn) -> Tensor:
    """`[vocab]`: normal numbers of some scale, rounded so that some of them tie."""
    vocab_size = draw(VOCAB_SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([0.0, 0.5, 3.0, 20.0]))
    digits = draw(st.sampled_from([0, 1, 6]))
    return (torch.randn(vocab_size, generator=generator) * scale).round(decimals=digits)


def check_draws(logits: Tensor, params: SamplingParams) -> None:
    """Chi-square of many draws; the probability reported for each drawn token; padding."""
    vocab_size = len(logits)
    padding = torch.tensor([float("nan"), float("inf"), 1e30])
    rows = torch.cat([logits, padding]).expand(NUM_DRAWS, -1)
    tokens, logprobs = sample_tokens(
        rows, numbers(NUM_DRAWS, 0), params, vocab_start=0, vocab_size=vocab_size
    )
    exact = truncated(logits, params)
    assert_drawn_from(tokens, exact)
    rtol = reporting_tolerance(logits, params)
    torch.testing.assert_close(logprobs.double().exp(), exact[tokens], rtol=rtol, atol=0)
    reported = torch.zeros(vocab_size, dtype=torch.float64)
    reported[tokens] = logprobs.double().exp()
    if bool((reported > 0).equal(exact > 0)):
        assert abs(float(reported.sum()) - 1) < rtol


def reporting_tolerance(logits: Tensor, params: SamplingParams) -> float:
    """Relative error of a probability whose logits were divided and compared in float32."""
    largest = float((logits / params.temperature).abs().max())
    return 2e-6 + 2 * torch.finfo(torch.float32).eps * largest


@given(logits_of(), st.sampled_from([0.3, 1.0, 1.7]))
def test_draws_and_reports_are_the_softmax(logits: Tensor, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=1, temperature=temperature)
    check_draws(logits, params)


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
    check_draws(logits, params)


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
