"""Off-policyness, from sums that were added over micro-batches."""

import itertools
import math

import pytest
import torch

from nested_reft_mcore.algorithm.diagnostics import (
    MetricSums,
    effective_sample_size,
    finalize_metrics,
    off_policy_maxima,
    off_policy_sums,
    ratio_p05,
    rejection_sums,
)
from nested_reft_mcore.algorithm.importance import (
    CorrectionSettings,
    TokenWeights,
    log_importance_ratio,
)


def measured(target, behavior, mask=None, clamp=20.0):
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    log_ratio = log_importance_ratio(target, behavior, mask, clamp)
    sums = off_policy_sums(log_ratio, target, behavior)
    return finalize_metrics(sums, off_policy_maxima(log_ratio))


def test_on_policy_is_the_origin():
    logprobs = -torch.rand(3, 5)
    assert measured(logprobs, logprobs.clone()) == {
        "rollout_corr/kl": 0.0,
        "rollout_corr/k3_kl": 0.0,
        "rollout_corr/chi2_token": 0.0,
        "rollout_corr/rollout_is_mean": 1.0,
        "rollout_corr/rollout_is_max": 1.0,
        "rollout_corr/rollout_is_eff_sample_size": 1.0,
        "nested/ess": 1.0,
        "nested/ess_seq": 1.0,
        "rollout_corr/chi2_seq": 0.0,
        "rollout_corr/seq_ratio_mean": 1.0,
        "nested/num_non_finite_ratios": 0.0,
    }


def test_expectations_over_a_known_distribution():
    """Weighting each token by how often the behavior policy draws it gives the exact divergences.

    With behavior (1/2, 1/4, 1/4) four draws 0, 0, 1, 2 are its exact frequencies.
    """
    behavior = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    target = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    draws = torch.tensor([[0, 0, 1, 2]])
    got = measured(target[draws].log(), behavior[draws].log())
    kl = float((behavior * (behavior / target).log()).sum())
    chi2 = float((target**2 / behavior).sum()) - 1
    assert got["rollout_corr/kl"] == pytest.approx(kl)
    assert got["rollout_corr/k3_kl"] == pytest.approx(kl)  # the mean ratio is exactly 1 here
    assert got["rollout_corr/chi2_token"] == pytest.approx(chi2)
    assert got["rollout_corr/rollout_is_mean"] == pytest.approx(1.0)
    assert got["rollout_corr/rollout_is_max"] == pytest.approx(2.0)
    assert got["nested/ess"] == pytest.approx(1 / (1 + chi2))


def test_kl_is_not_clamped_and_the_ratio_is():
    target, behavior = torch.tensor([[-5.0, -1.0]]), torch.tensor([[-1.0, -1.0]])
    got = measured(target, behavior, clamp=1.0)
    assert got["rollout_corr/kl"] == pytest.approx(2.0)
    assert got["rollout_corr/rollout_is_mean"] == pytest.approx((math.exp(-1) + 1) / 2)


def test_masked_and_non_finite_tokens_do_not_count():
    nan = float("nan")
    target = torch.tensor([[-1.0, nan, -2.0, -1.0]])
    behavior = torch.tensor([[-1.5, -1.0, nan, -1.0]])
    mask = torch.tensor([[True, True, False, True]])
    got = measured(target, behavior, mask)
    assert got["rollout_corr/kl"] == pytest.approx(-0.25)
    assert got["nested/num_non_finite_ratios"] == 1.0
    assert all(math.isfinite(value) for value in got.values())


def test_sums_add_over_micro_batches():
    torch.manual_seed(1)
    target, behavior = -torch.rand(6, 4) * 3, -torch.rand(6, 4) * 3
    mask = torch.rand(6, 4) < 0.6
    parts, maxima = [], {}
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        ratio = log_importance_ratio(target[rows], behavior[rows], mask[rows], 20.0)
        parts.append(off_policy_sums(ratio, target[rows], behavior[rows]))
        for name, value in off_policy_maxima(ratio).items():
            maxima[name] = max(maxima.get(name, 0.0), float(value))
    assert finalize_metrics(MetricSums.total(parts), maxima) == pytest.approx(
        measured(target, behavior, mask)
    )


def test_no_tokens_give_no_means():
    mask = torch.zeros(1, 2, dtype=torch.bool)
    got = measured(torch.zeros(1, 2), torch.zeros(1, 2), mask)
    assert got == {"nested/num_non_finite_ratios": 0.0}


@pytest.mark.parametrize(
    ("weights", "share"), [([1, 1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([2, 2, 0, 0], 0.5)]
)
def test_effective_sample_size(weights, share):
    n = len(weights)
    assert effective_sample_size(sum(weights) / n, sum(w * w for w in weights) / n) == share


def test_ratio_p05_is_the_nearest_rank():
    log_ratios = torch.tensor([0.01 * i * (-1) ** i for i in range(100)], dtype=torch.float64)
    # 100 tokens: the fifth smallest of min(r, 1/r), whatever side of 1 the ratio is on.
    assert ratio_p05(log_ratios) == pytest.approx(math.exp(-0.95))
    assert ratio_p05(log_ratios[:1]) == 1.0
    assert math.isnan(ratio_p05(torch.tensor([])))


@pytest.mark.parametrize(("num_tokens", "rank"), [(1, 1), (20, 1), (21, 2), (140, 7), (141, 8)])
def test_ratio_p05_rounds_the_rank_up(num_tokens, rank):
    log_ratios = -torch.arange(num_tokens, dtype=torch.float64) / 100
    assert ratio_p05(log_ratios) == pytest.approx(math.exp(-(num_tokens - rank) / 100))


def test_ratio_p05_does_not_depend_on_order():
    values = [0.5, -3.0, 0.1, 0.0]
    got = {ratio_p05(torch.tensor(order)) for order in itertools.permutations(values)}
    assert len(got) == 1
    assert got.pop() == pytest.approx(math.exp(-3))


def test_a_sequence_that_no_float_holds_is_cut():
    """Of 8 tokens each 80 nats off: the square of exp(640) is beyond float64."""
    logprobs = torch.full((1, 8), -80.0, dtype=torch.float64)
    mask = torch.ones(1, 8, dtype=torch.bool)
    log_ratio = log_importance_ratio(torch.zeros_like(logprobs), logprobs, mask, 80.0)
    sums = off_policy_sums(log_ratio, torch.zeros_like(logprobs), logprobs)
    metrics = finalize_metrics(sums)
    assert metrics["rollout_corr/seq_ratio_mean"] == pytest.approx(math.exp(300))
    assert math.isfinite(metrics["rollout_corr/chi2_seq"])


def test_what_was_asked_for_and_not_kept_is_rejected_and_padding_is_not():
    logprobs = torch.zeros(1, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    log_ratio = log_importance_ratio(logprobs, logprobs, mask, 20.0)
    kept = torch.tensor([[True, False, True, False]])
    weights = TokenWeights(kept.double(), kept)
    sums = rejection_sums(
        log_ratio, weights, kept, CorrectionSettings(), torch.zeros((), dtype=torch.int64)
    ).sums
    assert int(sums["rollout_corr/rollout_rs_masked_fraction"]) == 1
    assert int(sums["rollout_corr/rollout_rs_seq_masked_fraction"]) == 1


def test_no_ratio_leaves_no_sample():
    assert effective_sample_size(0.0, 0.0) == 0.0
