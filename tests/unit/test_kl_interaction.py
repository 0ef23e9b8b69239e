"""How several parts' KL follows from their own, and what is recommended for a budget."""

import math

import pytest

from nested_reft_mcore.algorithm.kl_interaction import KlInteraction, fit_interaction, recommend


def test_a_budget_of_kl_becomes_a_budget_of_the_sum_and_back():
    interaction = KlInteraction(1.4, 1.3)
    assert interaction.predict(interaction.total_within(0.2)) == pytest.approx(0.2)
    assert interaction.predict(0.0) == 0.0
    # Measured KLs of nothing can lie a rounding below zero.
    assert interaction.predict(-1e-9) == 0.0
    assert KlInteraction().total_within(0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(("scale", "exponent"), [(1.0, 1.0), (2.5, 1.6), (0.8, 0.9)])
def test_a_power_law_is_found_again(scale: float, exponent: float):
    totals = [0.05, 0.1, 0.2, 0.4]
    fit = fit_interaction(totals, [scale * total**exponent for total in totals])
    assert fit.interaction.scale == pytest.approx(scale)
    assert fit.interaction.exponent == pytest.approx(exponent)
    assert fit.spread == pytest.approx(0.0, abs=1e-9)


def test_the_spread_is_that_of_log_ratios():
    totals = [0.1, 0.2, 0.4, 0.8]
    noise = [0.1, -0.1, -0.1, 0.1]
    fit = fit_interaction(totals, [t * math.exp(n) for t, n in zip(totals, noise, strict=True)])
    assert fit.interaction.exponent == pytest.approx(1.0)
    # Four residuals of 0.1 with two degrees of freedom left.
    assert fit.spread == pytest.approx(math.sqrt(4 * 0.01 / 2))


def test_equal_sums_say_nothing_about_the_exponent():
    fit = fit_interaction([0.2, 0.2, 0.2], [0.3, 0.3, 0.3])
    assert fit.interaction.scale == pytest.approx(1.5)
    assert fit.interaction.exponent == 1.0


def test_wild_measurements_do_not_give_a_wild_exponent():
    fit = fit_interaction([0.1, 0.2], [0.001, 10.0])
    assert fit.interaction.exponent == 3.0


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="as many sums"):
        fit_interaction([0.1], [])
    with pytest.raises(ValueError, match="scale must be positive"):
        KlInteraction(0.0, 1.0)


# Shaped like SmolLM2-135M's whole layers: bad ends, and one bad layer in the middle.
KLS = [9.2, 4.8, 0.3, 0.3, 0.2, 2.85, 0.2, 0.3, 0.2, 1.6]


def test_borders_protected_layers_and_a_number_are_recommended():
    advice = recommend(KLS, KlInteraction(1.0, 1.0), kl_budget=0.8)
    # One number serves for both ends; what the other end has more of is protected by name.
    assert advice.border_layers == 1
    assert advice.protected == (1, 5)
    # Layers 2, 3, 4, 6, 7 and 8 cost 0.25 each in the mean, so three fit into 0.8.
    assert advice.num_skipped == 3
    assert advice.predicted_kl == pytest.approx(3 * 0.25)


def test_interaction_lowers_the_number():
    assert recommend(KLS, KlInteraction(1.5, 1.2), kl_budget=0.8).num_skipped == 2


def test_a_budget_below_every_layer_skips_nothing():
    advice = recommend(KLS, KlInteraction(), kl_budget=0.1)
    assert (advice.num_skipped, advice.predicted_kl) == (0, 0.0)
    assert advice.border_layers == len(KLS) // 2


def test_an_outlier_within_the_budget_is_protected_too():
    advice = recommend([0.01, 0.01, 0.2, 0.01, 0.01], KlInteraction(), kl_budget=1.0)
    assert (advice.border_layers, advice.protected, advice.num_skipped) == (0, (2,), 4)


def test_where_most_layers_cost_nothing_the_budget_alone_says_what_is_sensitive():
    """Three times a median of 0 would forbid every layer that costs anything at all."""
    advice = recommend([0.0, 0.0, 0.0, 0.05, 0.3], KlInteraction(), kl_budget=0.1)
    assert (advice.border_layers, advice.protected, advice.num_skipped) == (0, (4,), 4)
