"""pass@k against enumeration and the closed form, majority votes with ties, and intervals."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.accuracy import (
    CONFIDENCE_Z,
    best_of_k,
    bootstrap_interval,
    difference_interval,
    majority_reward,
    mean_interval,
    paired_score_interval,
    wilson_interval,
)


def score_by_likelihood(gains: int, losses: int, n: int, difference: float) -> float:
    """The score statistic with its nuisance parameter found by maximizing the likelihood itself."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def likelihood(share: float) -> float:
        cells = ((gains, share + difference), (losses, share))
        cells += ((n - gains - losses, 1 - 2 * share - difference),)
        return sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

    for _ in range(200):
        third = (high - low) / 3
        if likelihood(low + third) < likelihood(high - third):
            low += third
        else:
            high -= third
    variance = (2 * low + difference - difference**2) / n
    return ((gains - losses) / n - difference) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("gains", "losses", "n"), [(1, 7, 21), (40, 20, 160), (0, 1, 44), (3, 0, 12), (0, 2, 8)]
)
def test_the_ends_of_a_paired_interval_are_where_the_score_test_turns(gains, losses, n):
    for end, sign in zip(paired_score_interval(gains, losses, n), (1, -1), strict=True):
        score = score_by_likelihood(gains, losses, n, end)
        assert score == pytest.approx(sign * CONFIDENCE_Z, abs=1e-4)


def test_paired_intervals_known_from_books():
    """Airway hyper-responsiveness, in Fagerland, Lydersen and Laake 2014, Stat. Med. 33:2850."""
    low, high = paired_score_interval(1, 7, 21)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)
    assert paired_score_interval(7, 1, 21) == (-high, -low)
    z2 = CONFIDENCE_Z**2
    for n in (1, 4, 500):
        assert paired_score_interval(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))
    assert paired_score_interval(4, 0, 4)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 gains and 2 losses of 4"):
        paired_score_interval(3, 2, 4)


def test_differences_take_the_interval_that_fits_them():
    assert difference_interval([1, 0, 0], [1, 1, 0]) == paired_score_interval(0, 1, 3)
    assert difference_interval([0.5, 0.25], [0.5, 0.25]) == paired_score_interval(0, 0, 2)
    assert difference_interval([0.5, 1], [0.25, 1]) == bootstrap_interval([0.25, 0])
    # Rewards without bounds leave no interval but that of the data.
    assert difference_interval([7.0, 8.0], [7.0, 8.0]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="2 values but 1 others"):
        difference_interval([0, 1], [0])


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_best_of_k_is_pass_at_k_of_every_count(n: int):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        rewards = [1.0] * correct + [0.0] * (n - correct)
        closed_form = 1 - math.comb(n - correct, k) / math.comb(n, k)
        assert best_of_k(rewards, k) == pytest.approx(closed_form, abs=1e-12)
        # The paper's own way to compute it.
        product = 1.0
        for i in range(n - correct + 1, n + 1):
            product *= 1 - k / i
        stable = 1.0 if n - correct < k else 1 - product
        assert best_of_k(rewards, k) == pytest.approx(stable, abs=1e-12)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_maximum_over_all_subsets(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    subsets = [max(subset) for subset in itertools.combinations(rewards, k)]
    assert best_of_k(rewards, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    """Over all outcomes of 6 trials at probability 0.3, its mean is 1 - 0.7^3 exactly."""
    p, n, k = 0.3, 6, 3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    unbiased = sum(w * best_of_k([1.0] * c + [0.0] * (n - c), k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert unbiased == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert plug_in < unbiased - 0.03


def test_best_of_k_with_many_samples_does_not_overflow():
    assert best_of_k([1.0] * 3 + [0.0] * 4093, 1024) == pytest.approx(
        1 - (3072 * 3071 * 3070) / (4096 * 4095 * 4094), abs=1e-12
    )


@pytest.mark.parametrize("k", [0, 3])
def test_more_than_there_are_is_refused(k: int):
    with pytest.raises(ValueError, match=f"best of {k} of 2"):
        best_of_k([0.0, 1.0], k)


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        ([0, 0, 1], [1, 1, 0], 1.0),
        ([0, 1, 1], [1, 0, 0], 0.0),
        # A tie of two, and of three, of which one is right.
        ([0, 0, 1, 1], [1, 1, 0, 0], 0.5),
        ([0, 1, 2], [0, 1, 0], 1 / 3),
        # The right answer lost although it is not alone.
        ([0, 0, 1, 1, 1], [1, 1, 0, 0, 0], 0.0),
        # Those without an answer do not vote, though they are the most.
        ([None, None, None, 4], [0, 0, 0, 1], 1.0),
        ([None, None], [0, 0], 0.0),
        # Graded rewards: an answer counts as much as those who give it, on average.
        ([0, 0, 1], [0.5, 1.0, 0.0], 0.75),
    ],
)
def test_majority(answers, rewards, expected):
    assert majority_reward(answers, rewards) == pytest.approx(expected)
    order = list(range(len(answers)))
    random.Random(0).shuffle(order)
    shuffled = majority_reward([answers[i] for i in order], [rewards[i] for i in order])
    assert shuffled == pytest.approx(expected)


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (count, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0000, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(count / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_binary_values_take_wilson_and_others_the_bootstrap():
    assert mean_interval([1.0, 0.0, 1.0]) == wilson_interval(2 / 3, 3)
    assert mean_interval([1.0, 0.5, 1.0]) == bootstrap_interval([1.0, 0.5, 1.0])
    # Nothing right in 20 does not mean that nothing ever is.
    assert mean_interval([0.0] * 20)[1] > 0.1


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds():
    values = [(i * 37 % 101) / 100 for i in range(400)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) / len(values))
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert mean - low == pytest.approx(1.96 * deviation, rel=0.08)
    assert high - mean == pytest.approx(1.96 * deviation, rel=0.08)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = random.Random(5)
    hits = 0
    for _ in range(200):
        values = [generator.choice((0.0, 0.25, 0.5, 1.0)) for _ in range(60)]
        low, high = bootstrap_interval(values)
        hits += low <= 0.4375 <= high
    assert 0.88 < hits / 200 < 0.99


def test_no_values_are_refused():
    for interval in (mean_interval, bootstrap_interval):
        with pytest.raises(ValueError, match="no values"):
            interval([])
