"""Importance ratios and the three corrections."""

import math

import pytest
import torch

from nested_reft_mcore.algorithm.diagnostics import rejection_sums
from nested_reft_mcore.algorithm.importance import (
    CORRECTIONS,
    CorrectionSettings,
    correction_weights,
    log_importance_ratio,
)

INF, NAN = float("inf"), float("nan")


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def ratio_of(log_ratios, clamp=20.0):
    values = row(*log_ratios)
    mask = torch.ones_like(values, dtype=torch.bool)
    return log_importance_ratio(values, torch.zeros_like(values), mask, clamp)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("practical", lambda w: 1.0),
        ("base", lambda w: w),
        ("retrace", lambda w: 0.8 * min(1.0, w)),
    ],
)
def test_weights(name, weight):
    log_ratios = [0.0, 0.7, -0.7, 5.0, -5.0]
    got = correction_weights(name, ratio_of(log_ratios), CorrectionSettings(retrace_lambda=0.8))
    assert got.weights[0].tolist() == pytest.approx([weight(math.exp(x)) for x in log_ratios])
    assert bool(got.kept.all())


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_on_policy_weight_is_exactly_one(name):
    assert correction_weights(name, ratio_of([0.0, 0.0])).weights.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_weights_carry_no_gradient(name):
    target = row(-1.0, -2.0).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    log_ratio = log_importance_ratio(target, row(-1.5, -0.5), mask, 20.0)
    assert log_ratio.values.requires_grad
    assert not correction_weights(name, log_ratio).weights.requires_grad


def test_clamp_bounds_the_ratio():
    assert ratio_of([30.0, -30.0, 2.0], clamp=3.0).values.tolist() == [[3.0, -3.0, 2.0]]


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_non_finite_ratios_are_dropped_and_counted(name):
    target = row(-1.0, NAN, -INF, -INF, INF, -1.0, NAN)
    behavior = row(-2.0, -1.0, -1.0, -INF, -1.0, -INF, NAN)
    mask = torch.tensor([[True] * 6 + [False]])
    log_ratio = log_importance_ratio(target, behavior, mask, 20.0)
    assert log_ratio.kept.tolist() == [[True] + [False] * 6]
    # The last position is masked: it is nobody's failure.
    assert int(log_ratio.num_non_finite) == 5
    weights = correction_weights(name, log_ratio)
    assert weights.weights[0, 1:].tolist() == [0.0] * 6
    assert bool(torch.isfinite(weights.weights).all())
    # Where the weight is made of the whole sequence, a ratio that is not known spoils all of it.
    is_known = name not in ("trajectory", "geometric")
    assert weights.kept.tolist() == [[is_known] + [False] * 6]


@pytest.mark.parametrize("name", ["trajectory", "prefix"])
def test_sums_over_a_sequence_are_cut_as_sums(name):
    settings = CorrectionSettings(log_clamp=2.0)
    # Each ratio is within the clamp, their sum is not.
    weights = correction_weights(name, ratio_of([1.5, 1.5, 1.5]), settings).weights
    assert weights[0, -1].item() == pytest.approx(math.exp(2.0))
    weights = correction_weights(name, ratio_of([-1.5, -1.5, -1.5]), settings).weights
    assert weights[0, -1].item() == pytest.approx(math.exp(-2.0))


@pytest.mark.parametrize(("lower", "upper"), [(1.0, 2.0), (0.5, 1.0)])
def test_a_ratio_on_a_bound_of_icepop_is_within(lower, upper):
    log_ratio, settings = ratio_of([0.0]), CorrectionSettings(lower=lower, upper=upper)
    found = correction_weights("icepop", log_ratio, settings)
    assert (found.weights.tolist(), found.kept.tolist()) == ([[1.0]], [[True]])
    sums = rejection_sums(log_ratio, found, found.kept, settings, log_ratio.num_non_finite).sums
    for side in ("high", "low"):
        assert float(sums[f"rollout_corr/rollout_is_ratio_fraction_{side}"]) == 0


def test_gradient_of_the_log_ratio_survives_non_finite_neighbours():
    target = row(-1.0, NAN, -INF, -3.0).requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    log_ratio = log_importance_ratio(target, row(-2.0, -1.0, -1.0, NAN), mask, 20.0)
    log_ratio.values.exp().sum().backward()
    assert target.grad is not None
    assert target.grad.tolist() == [[pytest.approx(math.e), 0.0, 0.0, 0.0]]


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"unknown correction 'tiss'.*practical, base, retrace"):
        correction_weights("tiss", ratio_of([0.0]))
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        CorrectionSettings(retrace_lambda=1.5)
    for clamp in (0.0, -1.0, 100.0, NAN):
        with pytest.raises(ValueError, match="clamp of log-ratios lies between 0 and 80"):
            ratio_of([0.0], clamp)


def test_largest_clamp_keeps_float32_finite():
    values = torch.tensor([[1000.0]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    log_ratio = log_importance_ratio(values, torch.zeros(1, 1), mask, 80.0)
    assert bool(torch.isfinite(correction_weights("base", log_ratio).weights).all())
