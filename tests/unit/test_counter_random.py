"""Counter-based random numbers: reproducible, the same in Python and torch, and well mixed."""

import itertools
import math

import pytest
import torch

from nested_reft_mcore.algorithm.counter_random import (
    Stream,
    bits,
    integer_below,
    permutation,
    shuffled,
    uniform,
    uniforms,
)


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


def test_values_are_pinned():
    # A change here would make resumed runs draw other plans and other tokens.
    assert [f"{bits(*key):016x}" for key in ((), (0,), (0, 0), (1, 2, 3), (-1,))] == PINNED_BITS
    assert permutation(8, 1, 2) == PINNED_PERMUTATION


def test_torch_and_python_agree_bit_for_bit():
    extremes = [0, 1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63), 12345678901234567]
    keys = torch.tensor(extremes + list(range(-50, 50)))
    got = uniforms(7, keys[:, None], keys[None, :40], Stream.SAMPLING)
    want = [[uniform(7, a, b, 3) for b in keys[:40].tolist()] for a in keys.tolist()]
    assert got.dtype == torch.float64
    assert got.tolist() == want


def test_no_tensor_key_gives_a_scalar():
    assert uniforms(5, 6).shape == ()
    assert uniforms(5, 6).item() == uniform(5, 6)


def test_draws_lie_in_the_open_interval():
    draws = uniforms(3, torch.arange(200_000))
    assert draws.min() > 0
    assert draws.max() < 1
    # Odd multiples of 2**-53: neither end can be reached by any key.
    assert bool((draws * 2**53 % 2 == 1).all())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_small_consecutive_keys_are_uniform_and_uncorrelated(place):
    keys: list[int | torch.Tensor] = [4, 0, 9]
    keys[place] = torch.arange(100_000)
    draws = uniforms(*keys)
    counts = torch.histc(draws, bins=100, min=0, max=1).tolist()
    # 99 degrees of freedom: mean 99, deviation 14; 170 is five deviations away.
    assert chi_square(counts, 1000) < 170
    centred = draws - 0.5
    correlation = float((centred[1:] * centred[:-1]).mean() * 12)
    assert abs(correlation) < 5 / math.sqrt(len(draws))


def test_one_flipped_key_bit_flips_half_of_the_output():
    for place, bit in itertools.product(range(3), range(0, 64, 7)):
        flips = 0
        for trial in range(100):
            key = [trial, 1, 2]
            other = list(key)
            other[place] ^= 1 << bit
            flips += (bits(*key) ^ bits(*other)).bit_count()
        # 6400 fair coins: deviation 40.
        assert abs(flips - 3200) < 240


def test_keys_of_another_length_or_order_are_unrelated():
    key_sets = [(), (0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (1, 2), (2, 1)]
    assert len({bits(*key) for key in key_sets}) == len(key_sets)


def test_permutations_are_all_equally_likely():
    num_draws = 4_800
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for draw in range(num_draws):
        counts[tuple(permutation(4, 11, draw))] += 1
    # 23 degrees of freedom: mean 23, deviation 6.8.
    assert chi_square(counts.values(), num_draws / 24) < 60


def test_shuffled_keeps_the_items():
    assert sorted(shuffled([5, 5, 9, 2], 1)) == [2, 5, 5, 9]
    assert permutation(0, 1) == []
    assert sorted(permutation(1000, 2)) == list(range(1000))
    assert permutation(1000, 2) != permutation(1000, 3)


@pytest.mark.parametrize("bound", [1, 2, 7, 2**64, 2**64 + 1, math.comb(200, 100)])
def test_integer_below_stays_below_and_reaches_both_halves(bound):
    draws = [integer_below(bound, 5, i) for i in range(200)]
    assert all(0 <= draw < bound for draw in draws)
    if bound > 1:
        below_half = sum(draw < bound / 2 for draw in draws)
        assert 50 < below_half < 150


def test_integer_below_is_uniform():
    counts = [0] * 7
    for draw in range(3_500):
        counts[integer_below(7, 1, draw)] += 1
    assert chi_square(counts, 500) < 30


def test_integer_below_refuses_an_empty_range():
    with pytest.raises(ValueError, match="positive bound, got 0"):
        integer_below(0, 1)


PINNED_BITS = [
    "e220a8397b1dcdaf",
    "7fc37233dfca105f",
    "f88d31736ce4d0b3",
    "60e7663c7c53a4db",
    "cd73fe3de975ac26",
]
PINNED_PERMUTATION = [0, 7, 3, 6, 2, 1, 5, 4]
