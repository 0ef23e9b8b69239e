"""What length and distance from the reference cost, in numbers that can be followed by hand."""

import math

import pytest
import torch
from test_config_checks import config

from nested_reft_mcore.algorithm.importance import log_importance_ratio
from nested_reft_mcore.algorithm.kl import KlEstimator, sequence_kl
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.shaping import length_penalty, overlong_penalty
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutBatch, RolloutStats
from nested_reft_mcore.training.advantages import shaped_rewards


def test_only_the_last_tokens_are_overlong() -> None:
    lengths = torch.tensor([1, 6, 7, 9, 10, 12])
    # Free up to 10 - 4 tokens, then a quarter of the factor for each, and never more than it.
    expected = [0.0, 0.0, -0.5, -1.5, -2.0, -2.0]
    assert overlong_penalty(lengths, 10, 4, 2.0).tolist() == expected
    assert overlong_penalty(lengths, 10, 1).tolist() == [0.0, 0.0, 0.0, 0.0, -1.0, -1.0]
    assert overlong_penalty(lengths[:5], 10, 10).tolist() == pytest.approx(
        [-0.1, -0.6, -0.7, -0.9, -1.0]
    )


@pytest.mark.parametrize(("buffer", "factor"), [(0, 1.0), (11, 1.0), (4, -1.0)])
def test_overlong_shaping_that_makes_no_sense_is_refused(buffer: int, factor: float) -> None:
    with pytest.raises(ValueError, match="overlong shaping needs"):
        overlong_penalty(torch.tensor([1]), 10, buffer, factor)


def test_every_token_costs_its_share() -> None:
    assert length_penalty(torch.tensor([0, 5, 10]), 10, 0.5).tolist() == [0.0, -0.25, -0.5]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # Of d = log 2, log 1/2, log 2 at the tokens that count.
    [("k1", -math.log(2)), ("k2", 1.5 * math.log(2) ** 2), ("k3", 1.5 - math.log(2))],
)
def test_a_sequence_costs_the_sum_of_its_tokens(estimator: KlEstimator, expected: float) -> None:
    ref = torch.tensor([[2.0, 0.5, 2.0, 9.0]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    log_ratio = log_importance_ratio(ref, torch.zeros_like(ref), mask, 20.0)
    found = sequence_kl(log_ratio, estimator)
    assert found.tolist() == pytest.approx([expected])
    assert not found.requires_grad


def rollouts_of(*lengths: int) -> RolloutBatch:
    rollouts = tuple(
        Rollout(Prompt((5, 6, 7), ""), 0, sample, (8,) * n, (-1.0,) * n, "stop")
        for sample, n in enumerate(lengths)
    )
    return RolloutBatch(rollouts, len(lengths), LayerSkipPlan.full(2), RolloutStats(0, 0.0))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, [1.0, 1.0]),
        # The prompt's three tokens are not counted.
        ({"reward": {"overlong_buffer_len": 2, "overlong_penalty_factor": 4.0}}, [1.0, -1.0]),
        ({"reward": {"length_penalty": 0.4}}, [0.8, 0.7]),
        (
            {"reward": {"overlong_buffer_len": 2, "length_penalty": 0.4}},
            [0.8, 0.2],
        ),
        # The policy finds each token twice as likely as the reference does.
        (
            {"algorithm": {"kl_reward_coef": 0.1, "kl_penalty": "k1"}},
            [1 - 0.2 * math.log(2), 1 - 0.3 * math.log(2)],
        ),
        (
            {"algorithm": {"kl_reward_coef": 0.1, "kl_penalty": "k3"}},
            [1 - 0.2 * (math.log(2) - 0.5), 1 - 0.3 * (math.log(2) - 0.5)],
        ),
    ],
)
def test_scores_less_what_length_and_distance_cost(sections, expected) -> None:
    made = config(rollout={"max_new_tokens": 4}, **sections)
    rollouts = rollouts_of(2, 3)
    batch = TrainingBatch.from_rollouts(rollouts.rollouts, torch.zeros(2), 0)
    if "algorithm" in sections:
        ref = torch.full(batch.tokens.shape, -3.0)
        batch = batch.with_ref_logprobs(ref).with_old_logprobs(ref + math.log(2))
    found = shaped_rewards(torch.ones(2), rollouts, batch, made)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
