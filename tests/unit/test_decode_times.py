"""What rounds of decode passes say, and how much of it is the machine's other work."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from nested_reft_mcore.analysis.decode_times import typical_round
from nested_reft_mcore.config.probe_record import NOISE_LIMIT

# The full model, without attentions, without MLPs, without layers.
SECONDS = (0.030, 0.018, 0.020, 0.006)


def rounds(num_rounds: int, scatter: float, seed: int) -> list[list[float]]:
    """Passes that take longer or shorter by a normal number of this deviation, in seconds."""
    draw = random.Random(seed)
    return [[s + draw.gauss(0.0, scatter) for s in SECONDS] for _ in range(num_rounds)]


def test_noise_is_the_standard_error_of_what_all_layers_take() -> None:
    found = [typical_round(rounds(15, 1e-3, seed)) for seed in range(400)]
    layers = [medians[0] - medians[-1] for medians, _ in found]
    # How far the figure really scatters over repetitions, as a share of what layers take.
    scatter = statistics.stdev(layers) / 0.024
    # The loudest two of four cases count: never too little, and not much too much.
    assert scatter < statistics.mean(noise for _, noise in found) < 1.6 * scatter


@pytest.mark.parametrize(("num_rounds", "share"), [(4, 1.0), (16, 0.5)])
def test_four_times_the_rounds_halve_it(num_rounds: int, share: float) -> None:
    deviations = (-1e-3, 1e-3)
    found = [[s + deviations[i % 2] for s in SECONDS] for i in range(num_rounds)]
    _, noise = typical_round(found)
    assert noise == pytest.approx(share * 1.2533 * 1.4826 * math.sqrt(2) * 1e-3 / 2 / 0.024)


def test_one_slow_round_moves_nothing() -> None:
    quiet = [list(SECONDS) for _ in range(7)]
    assert typical_round(quiet) == (list(SECONDS), 0.0)
    quiet[2] = [50 * s for s in SECONDS]
    assert typical_round(quiet) == (list(SECONDS), 0.0)


def test_what_cannot_be_resolved_is_all_noise() -> None:
    assert typical_round([list(SECONDS)])[1] == 1.0
    # Without layers as slow as with them; and scatter far beyond what layers take.
    assert typical_round([[0.03, 0.03, 0.03, 0.03]] * 5)[1] == 1.0
    assert all(typical_round(rounds(5, 0.5, seed))[1] > NOISE_LIMIT for seed in range(20))
