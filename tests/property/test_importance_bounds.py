"""What truncated weights promise about their second moment, by exact sums, with equality."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.importance import (
    CorrectionSettings,
    correction_weights,
    log_importance_ratio,
)
from nested_reft_mcore.analysis.sequence_space import SequenceSpace

ROUNDING = 1e-12


def weights(name, target, behavior, mask=None, **bounds):
    """`[rows, tokens]` weights of a correction, for log-probs of rows; 0 where it keeps nothing."""
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    log_ratio = log_importance_ratio(target, behavior, mask, clamp=80.0)
    return correction_weights(name, log_ratio, CorrectionSettings(log_clamp=80.0, **bounds)).weights


def total_variation(target, behavior) -> float:
    return float((target.exp() - behavior.exp()).abs().sum()) / 2


@st.composite
def one_token_policies(draw):
    """Log-probs of two distributions over 2 to 6 tokens; the target may lack some of them."""
    size = draw(st.integers(2, 6))
    logits = st.lists(st.floats(-8, 8), min_size=size, max_size=size)
    target, behavior = (torch.tensor(draw(logits), dtype=torch.float64) for _ in range(2))
    absent = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    for token in absent:
        target[token] = -torch.inf
    return target.log_softmax(0), behavior.log_softmax(0)


@given(one_token_policies(), st.floats(1.0, 50.0))
def test_second_moments_of_truncated_token_weights(policies, bound):
    target, behavior = policies
    drawn = behavior.exp()
    truncated = weights("tis", target[:, None], behavior[:, None], upper=bound)[:, 0]
    assert float(drawn @ truncated.square()) <= bound + bound * ROUNDING
    traces = weights("retrace", target[:, None], behavior[:, None])[:, 0]
    assert float(drawn @ traces.square()) <= 1 - total_variation(target, behavior) + ROUNDING
    # The first moment, which is what makes the second bound tick, is an equality.
    assert float(drawn @ traces) == pytest.approx(1 - total_variation(target, behavior), abs=1e-12)
    # And without the bound the second moment is chi-squared plus one, never below 1.
    free = weights("base", target[:, None], behavior[:, None])[:, 0]
    if bool(target.isfinite().all()):
        assert float(drawn @ free) == pytest.approx(1.0, rel=1e-12)
    assert float(drawn @ free.square()) >= float(drawn @ truncated.square()) - ROUNDING


SPACE = SequenceSpace(3, 4)


@st.composite
def tables(draw):
    """Two policies over all completions, near or far from each other."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (len(SPACE.prefixes), SPACE.vocabulary)
    logits = torch.randn(*shape, dtype=torch.float64, generator=generator)
    change = torch.randn(*shape, dtype=torch.float64, generator=generator)
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 4.0]))
    return logits.log_softmax(1), (logits + spread * change).log_softmax(1)


@given(tables(), st.floats(1.0, 50.0))
def test_second_moments_of_truncated_sequence_weights(policies, bound):
    target, behavior = policies
    tokens = SPACE.logprobs(target), SPACE.logprobs(behavior), SPACE.mask
    drawn, wanted = SPACE.probabilities(behavior), SPACE.probabilities(target)
    variation = total_variation(wanted.log(), drawn.log())

    def per_completion(name, **bounds):
        return weights(name, *tokens, **bounds)[:, 0]

    assert float(drawn @ per_completion("trajectory")) == pytest.approx(1.0, rel=1e-11)
    truncated = per_completion("trajectory", upper=bound)
    assert float(drawn @ truncated.square()) <= bound * (1 + ROUNDING)
    capped = per_completion("trajectory", upper=1.0)
    assert float(drawn @ capped) == pytest.approx(1 - variation, abs=1e-11)
    assert float(drawn @ capped.square()) <= 1 - variation + ROUNDING
    # The product of the traces at the last token is below the capped product of the ratios.
    last = weights("retrace_cumulative", *tokens).gather(1, SPACE.lengths[:, None] - 1)[:, 0]
    assert bool((last <= capped + ROUNDING).all())
    assert float(drawn @ last.square()) <= 1 - variation + ROUNDING


@given(st.floats(1.0, 50.0), st.integers(1, 4))
def test_the_first_bound_is_reached(bound, num_absent):
    """The target lives where the behavior has 1 / C of its mass: each ratio is 0 or C."""
    behavior = torch.tensor(
        [1 / bound, *[(1 - 1 / bound) / num_absent] * num_absent], dtype=torch.float64
    ).log()
    target = torch.full_like(behavior, -torch.inf)
    target[0] = 0.0
    found = weights("tis", target[:, None], behavior[:, None], upper=bound)[:, 0]
    assert float(behavior.exp() @ found.square()) == pytest.approx(bound, rel=1e-12)


@given(one_token_policies(), st.floats(0.05, 0.95))
def test_the_second_bound_is_reached(policies, kept):
    """Where the target is the behavior policy cut down to some tokens every ratio is 0 or above 1;
    with equal policies the moment is 1, the largest there is."""
    _, behavior = policies
    cut = behavior.clone()
    cut[behavior.exp().cumsum(0) > max(kept, float(behavior[0].exp()))] = -torch.inf
    target = cut.log_softmax(0)
    found = weights("retrace", target[:, None], behavior[:, None])[:, 0]
    got = float(behavior.exp() @ found.square())
    assert got == pytest.approx(1 - total_variation(target, behavior), abs=1e-12)
    same = weights("retrace", behavior[:, None], behavior[:, None])[:, 0]
    assert float(behavior.exp() @ same.square()) == pytest.approx(1.0, abs=1e-14)


def test_the_bounds_would_fail_for_other_weights():
    """The untruncated ratio breaks both; so the tests above can fail."""
    behavior = torch.tensor([0.01, 0.99], dtype=torch.float64).log()
    target = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    free = weights("base", target[:, None], behavior[:, None])[:, 0]
    second = float(behavior.exp() @ free.square())
    assert second > 50.0
    assert second > 1 - total_variation(target, behavior)
