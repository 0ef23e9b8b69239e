"""What completions with rewards say of a policy: best of k, majority of n, and how sure that is.

A benchmark's prompts are a sample of the questions that could have been asked, and completions of
one prompt resemble each other. So every figure is a mean over prompts of something that is known
per prompt, and its interval is taken over prompts (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from nested_reft_mcore.algorithm.counter_random import Stream, uniforms

CONFIDENCE_Z = 1.959963984540054
"""Of a standard normal: 95% lie within so many deviations."""
NUM_RESAMPLES = 2000
"""Of the bootstrap: its ends at 2.5% and 97.5% are then known to a tenth of the width."""
_MOST_NUMBERS = 1 << 22
"""In memory at the same time while resampling."""


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Expected largest reward of k of the n completions, drawn without replacement.

    With rewards 0 and 1 this is the unbiased estimate of pass@k, 1 - C(n - c, k) / C(n, k) for c
    right ones of n (Chen et al. 2021, arXiv 2107.03374, eq. 1); 1 - (1 - c / n)^k is too small.

    Raises:
        ValueError: k is not in 1 .. n.
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"best of {k} of {n} completions; expected 1 to {n}")
    # The i-th smallest of n (from 1) is the largest of k in C(i - 1, k - 1) of C(n, k) draws.
    draws = math.comb(n, k)
    shares = (math.comb(i - 1, k - 1) / draws for i in range(k, n + 1))
    return math.fsum(s * r for s, r in zip(shares, sorted(rewards)[k - 1 :], strict=True))


def majority_reward(answers: Sequence[int | None], rewards: Sequence[float]) -> float:
    """Reward of the most frequent answer (self-consistency, Wang et al. 2022, arXiv 2203.11171).

    `answers` numbers equal answers alike; None, no answer, does not vote. An answer's reward is the
    mean over the completions that give it. **Ties** are broken by a fair draw in expectation: the
    mean over the tied answers. So neither the order of samples nor chance matters, and at n = 2 or
    with all answers different it is the mean reward. 0 where nobody votes.

    Raises:
        ValueError: the lengths differ.
    """
    if len(answers) != len(rewards):
        raise ValueError(f"{len(answers)} answers but {len(rewards)} rewards")
    by_answer: dict[int, list[float]] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            by_answer.setdefault(answer, []).append(reward)
    most = max(map(len, by_answer.values()), default=0)
    tied = [_mean(group) for group in by_answer.values() if len(group) == most]
    return _mean(tied) if tied else 0.0


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of the mean over prompts, one value a prompt.

    Where every value is 0 or 1 it is Wilson's score interval, which stays honest where all or none
    are right: a bootstrap of equal values has no width. Otherwise, for means over samples, ties or
    graded rewards, it is the percentile bootstrap over prompts.

    Raises:
        ValueError: there are no values.
    """
    _require_some(values)
    if all(value in (0.0, 1.0) for value in values):
        return wilson_interval(_mean(values), len(values))
    return bootstrap_interval(values)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95% score interval of a probability, where a share of n independent trials succeeded.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", eq. 14.

    Raises:
        ValueError: there are no trials, or the share is none.
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"a share of {share} of {n} trials; expected 0 to 1 of at least one")
    z2 = CONFIDENCE_Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = CONFIDENCE_Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and at 1 rounding would leave the end a little inside.
    return (
        0.0 if share == 0 else max(0.0, middle - half),
        1.0 if share == 1 else min(1.0, middle + half),
    )


def difference_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of the mean of `values` minus `others`, paired by prompt.

    Where every value is 0 or 1 it is the paired score interval, also where all differences are 0
    and rewards lie in [0, 1]: a bootstrap of zeros has no width, however few prompts there are.
    Otherwise it is the percentile bootstrap over the differences.

    Raises:
        ValueError: there are no values, or the lengths differ.
    """
    _require_some(values)
    if len(values) != len(others):
        raise ValueError(f"{len(values)} values but {len(others)} others")
    both = [*values, *others]
    differences = [value - other for value, other in zip(values, others, strict=True)]
    is_shares = all(value in (0.0, 1.0) for value in both)
    is_equal = not any(differences) and all(0 <= value <= 1 for value in both)
    if is_shares or is_equal:
        gains = sum(difference > 0 for difference in differences)
        losses = sum(difference < 0 for difference in differences)
        return paired_score_interval(gains, losses, len(differences))
    return bootstrap_interval(differences)


def paired_score_interval(gains: int, losses: int, n: int) -> tuple[float, float]:
    """95% score interval of a difference of two paired shares: all d whose test is not significant.

    Of n pairs `gains` succeeded in the first alone and `losses` in the second alone. Tango 1998,
    "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17:891-908, eq. 9 and 11. Without gains and losses
    it is -z^2 / (n + z^2) to z^2 / (n + z^2).

    Raises:
        ValueError: there are no pairs, or more gains and losses than pairs.
    """
    if n < 1 or gains < 0 or losses < 0 or gains + losses > n:
        raise ValueError(f"{gains} gains and {losses} losses of {n} pairs")
    upper = _score_bound(gains, losses, n)
    return -_score_bound(losses, gains, n), upper


def _score_bound(gains: int, losses: int, n: int) -> float:
    """The largest difference whose score statistic is no smaller than -z, by bisection."""
    low, high = (gains - losses) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _score(gains, losses, n, middle) >= -CONFIDENCE_Z:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _score(gains: int, losses: int, n: int, difference: float) -> float:
    """Score statistic of a difference; 0 at the estimate, below it for larger differences."""
    # The largest likelihood of losses under that difference: 2 n q^2 + b q + c = 0.
    b = -gains - losses + (2 * n - gains + losses) * difference
    c = -losses * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * share + difference * (1 - difference))
    distance = gains - losses - n * difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile bootstrap of the mean: prompts are drawn again with replacement.

    The draws are a pure function of the number of values (`counter_random`): the same values give
    the same interval on every machine.

    Raises:
        ValueError: there are no values.
    """
    _require_some(values)
    column = torch.tensor(values, dtype=torch.float64)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(_resampled_means(column), ends)
    return float(low), float(high)


def _resampled_means(values: Float64[Tensor, " n"]) -> Float64[Tensor, " resamples"]:
    n = len(values)
    places = torch.arange(n)
    rows = max(1, _MOST_NUMBERS // n)
    means: list[Tensor] = []
    for start in range(0, NUM_RESAMPLES, rows):
        resamples = torch.arange(start, min(start + rows, NUM_RESAMPLES))
        drawn = uniforms(int(Stream.BOOTSTRAP), n, resamples[:, None], places[None, :]) * n
        means.append(values[drawn.to(torch.int64).clamp_(max=n - 1)].mean(-1))
    return torch.cat(means)


def _require_some(values: Sequence[float]) -> None:
    if not values:
        raise ValueError("an interval of no values")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
