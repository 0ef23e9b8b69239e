"""Metrics of a step of several updates are those of all its tokens."""

import pytest
import torch

from nested_reft_mcore.algorithm.diagnostics import MetricTerms
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.training.update import UpdateResult, metrics_of_step

NUM_ROWS, LENGTH = 8, 5


def inputs() -> LossInputs:
    generator = torch.Generator().manual_seed(5)
    target, behavior, entropy = -torch.rand(3, NUM_ROWS, LENGTH, generator=generator)
    # The second update has the largest ratio, two that are not finite and fewer tokens; the third
    # none that counts.
    behavior[3, 1] -= 3.0
    behavior[3, 2:4] = torch.nan
    mask = torch.rand(NUM_ROWS, LENGTH, generator=generator) < 0.8
    mask[3], mask[4], mask[5:] = True, False, False
    advantages = torch.randn(NUM_ROWS, generator=generator)
    return LossInputs(target, behavior, advantages, mask, entropy=-entropy)


def update_of(rows: slice, *, applied: bool = True, grad_norm: float = 0.0) -> UpdateResult:
    whole = inputs()
    assert whole.entropy is not None
    part = LossInputs(
        whole.target_logprobs[rows],
        whole.behavior_logprobs[rows],
        whole.advantages[rows],
        whole.response_mask[rows],
        entropy=whole.entropy[rows],
    )
    output = policy_loss(part, ObjectiveSettings())
    terms = MetricTerms(output.metrics, output.maxima, output.log_ratios).on_host()
    return UpdateResult(applied, terms, {"actor/grad_norm": grad_norm}, torch.zeros(1, 1))


def test_updates_merge_as_if_there_had_been_one():
    parts = [update_of(slice(0, 3)), update_of(slice(3, 5)), update_of(slice(5, 8))]
    merged, whole = metrics_of_step(parts), update_of(slice(0, 8)).metrics
    assert merged == pytest.approx(whole, rel=1e-12)
    assert merged["nested/num_non_finite_ratios"] == 2
    assert merged["rollout_corr/rollout_is_max"] > 5
    # Neither the mean of the parts' values, nor gone because a part has none.
    assert "actor/pg_loss" not in parts[2].metrics
    assert merged["nested/ess"] != pytest.approx(
        sum(part.metrics["nested/ess"] for part in parts[:2]) / 2, rel=1e-3
    )


def test_what_is_said_of_an_update_is_averaged():
    parts = [update_of(slice(0, 4), grad_norm=1.0), update_of(slice(4, 8), grad_norm=4.0)]
    assert metrics_of_step(parts)["actor/grad_norm"] == 2.5
