"""From judged completions to accuracies, intervals and the names of metrics."""

import math

import pytest

from nested_reft_mcore.algorithm.accuracy import (
    bootstrap_interval,
    paired_score_interval,
    wilson_interval,
)
from nested_reft_mcore.training.evaluation_figures import (
    FULL,
    JudgedCompletion,
    all_figures,
    pass_at_k_of,
)
from nested_reft_mcore.training.evaluation_table import heading, print_figures


def judged(row, rewards, *, policy=FULL, mode="sampled", dataset="maths", answers=None, **more):
    return [
        JudgedCompletion(
            policy,
            mode,
            dataset,
            row,
            sample,
            float(reward),
            answers[sample] if answers else sample,
            num_tokens=10 + sample,
            is_truncated=sample == 3,
            **more,
        )
        for sample, reward in enumerate(rewards)
    ]


def only(figures, **wanted):
    (found,) = [f for f in figures if all(getattr(f, k) == v for k, v in wanted.items())]
    return found


def test_pass_at_k_of_synthetic_counts_is_the_closed_form():
    counts = {0: 0, 1: 1, 2: 4, 3: 2, 4: 0}
    completions = [one for row, c in counts.items() for one in judged(row, [1] * c + [0] * (4 - c))]
    figures = only(all_figures(completions), part="")
    for k in (2, 4):
        per_prompt = [1 - math.comb(4 - c, k) / math.comb(4, k) for c in counts.values()]
        estimate = figures.estimates[f"best@{k}/mean"]
        assert estimate.value == pytest.approx(sum(per_prompt) / 5)
        assert estimate.low < estimate.value < estimate.high
    # Of all four samples it is 0 or 1: Wilson's interval; of two it is not: the bootstrap.
    every = figures.estimates["best@4/mean"]
    assert (every.low, every.high) == wilson_interval(3 / 5, 5)
    two = [1 - math.comb(4 - c, 2) / 6 for c in counts.values()]
    pair = figures.estimates["best@2/mean"]
    assert (pair.low, pair.high) == pytest.approx(bootstrap_interval(two))
    assert figures.estimates["mean@4"].value == pytest.approx(7 / 20)
    assert figures.response_length == {"mean@4": pytest.approx(11.5)}
    assert figures.clip_ratio == {"mean@4": 0.25}


def test_k_goes_by_powers_of_two_up_to_all():
    assert pass_at_k_of(1) == []
    assert pass_at_k_of(2) == [2]
    assert pass_at_k_of(6) == [2, 4, 6]
    assert pass_at_k_of(8) == [2, 4, 8]


def test_majority_takes_equal_answers_together():
    completions = [
        # Right answers are two of four, the others differ.
        *judged(0, [1, 0, 0, 1], answers=[0, 1, 2, 0]),
        # A tie of two answers, one of them right.
        *judged(1, [1, 1, 0, 0], answers=[0, 0, 1, 1]),
        # Right once, outvoted.
        *judged(2, [1, 0, 0, 0], answers=[0, 1, 1, None]),
    ]
    figures = only(all_figures(completions), part="")
    assert figures.estimates["maj@4/mean"].value == pytest.approx((1 + 0.5 + 0) / 3)


def test_names_are_those_of_verl_and_every_label_has_its_own():
    easy, hard = (("level", "1"), ("subject", "Algebra")), (("level", "10"),)
    completions = [
        *judged(0, [1], mode="greedy", labels=easy),
        *judged(0, [1, 0], labels=easy),
        *judged(1, [0], mode="greedy", labels=hard),
        *judged(1, [0, 0], labels=hard),
        *judged(2, [1], mode="greedy", labels=(("level", "2"),)),
        *judged(2, [0, 0], labels=(("level", "2"),)),
        *judged(0, [0], mode="greedy", dataset="other"),
    ]
    figures = all_figures(completions)
    assert [(f.dataset, f.part, f.num_prompts) for f in figures] == [
        *(("maths", "", 3), ("maths", "level=1", 1), ("maths", "level=2", 1)),
        *(("maths", "level=10", 1), ("maths", "subject=Algebra", 1), ("other", "", 1)),
    ]
    metrics = {name: value for one in figures for name, value in one.metrics().items()}
    assert metrics["val-core/maths/reward/greedy"] == pytest.approx(2 / 3)
    assert metrics["val-core/maths/reward/mean@2"] == pytest.approx(1 / 6)
    assert metrics["val-core/maths/reward/best@2/mean"] == pytest.approx(1 / 3)
    assert metrics["val-core/maths/reward/maj@2/mean"] == pytest.approx(1 / 6)
    assert metrics["val-core/other/reward/greedy"] == 0
    low, high = wilson_interval(2 / 3, 3)
    assert metrics["val-core/maths/reward/greedy/low"] == low
    assert metrics["val-core/maths/reward/greedy/high"] == high
    assert metrics["val-aux/maths/level=1/reward/greedy"] == 1
    assert metrics["val-aux/maths/num_prompts"] == 3
    assert metrics["val-aux/maths/response_length/greedy"] == 10
    core = {name for name in metrics if name.startswith("val-core")}
    assert {name for name in core if not name.endswith(("/low", "/high"))} == {
        *(f"val-core/maths/reward/{s}" for s in ("greedy", "mean@2", "best@2/mean", "maj@2/mean")),
        "val-core/other/reward/greedy",
    }


def test_a_weighted_sum_is_called_no_accuracy(capsys):
    completions = [*judged(0, [1.25, 0.5]), *judged(0, [-0.25, 0.5], policy="3")]
    figures = all_figures(completions, "weighted_sum")
    metrics = figures[0].metrics()
    assert metrics["val-core/maths/weighted_sum/mean@2"] == 0.875
    assert not [name for name in metrics if "/reward/" in name]
    print_figures(figures)
    out = capsys.readouterr().out
    assert "0.875 [" in out
    assert "weighted_sum, which is no accuracy, [95% interval" in out
    assert "-0.750 [" in out
    assert "percent" not in out
    assert "points" not in out


def test_what_skipping_costs_is_paired_by_prompt(capsys):
    full, nested = [1, 1, 1, 0, 1, 0, 1, 1], [1, 0, 1, 0, 1, 0, 0, 1]
    completions = [
        one
        for policy, rewards in ((FULL, full), ("3,5.mlp", nested))
        for row, reward in enumerate(rewards)
        for one in judged(row, [reward], policy=policy, mode="greedy")
    ]
    figures = all_figures(completions)
    assert not only(figures, policy=FULL).change
    change = only(figures, policy="3,5.mlp").change["greedy"]
    assert change.value == pytest.approx(-2 / 8)
    assert (change.low, change.high) == paired_score_interval(0, 2, 8)
    metrics = only(figures, policy="3,5.mlp").metrics()
    assert metrics["val-core/maths@skip=3,5.mlp/reward/greedy"] == 0.5
    assert metrics["val-aux/maths@skip=3,5.mlp/change/greedy"] == pytest.approx(-0.25)
    print_figures(figures)
    shown = capsys.readouterr().out
    low, high = (100 * x for x in wilson_interval(0.75, 8))
    assert f"75.0 [{low:.1f}, {high:.1f}]" in shown
    assert "skip 3,5.mlp" in shown
    assert f"-25.0 [{100 * change.low:+.1f}, {100 * change.high:+.1f}]" in shown


def test_no_disagreement_on_four_prompts_is_no_certainty():
    """Greedy and sampled: around a difference of 0 is the width that four prompts leave."""
    completions = [
        one
        for policy in (FULL, "3")
        for row in range(4)
        for one in (
            *judged(row, [1.0], policy=policy, mode="greedy"),
            *judged(row, [0.0, 1.0], policy=policy),
        )
    ]
    changes = only(all_figures(completions), policy="3").change
    assert set(changes) >= {"greedy", "mean@2"}
    for change in changes.values():
        assert change.value == 0
        assert (change.low, change.high) == (pytest.approx(-0.4899, abs=1e-4), -change.low)


def test_headings_are_the_fields():
    assert [heading(name) for name in ("greedy", "mean@8", "best@4/mean", "maj@8/mean")] == [
        *("greedy", "avg@8", "pass@4", "maj@8"),
    ]
