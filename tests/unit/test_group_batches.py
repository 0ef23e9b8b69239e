"""Batches of groups, filtered and not, against sums over every batch and by hand."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import equal_groups, group_relative_advantages
from nested_reft_mcore.algorithm.importance import CorrectionSettings
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.objectives import ObjectiveSettings
from nested_reft_mcore.analysis.estimators import DAMPING, estimators
from nested_reft_mcore.analysis.exact_gradients import (
    Sampling,
    batch_moments,
    group_moments,
    policy_gradient,
    token_gradients,
)
from nested_reft_mcore.analysis.group_batches import GroupBatch, group_batch_moments
from nested_reft_mcore.analysis.sequence_space import SequenceSpace
from nested_reft_mcore.analysis.toy_policy import ToyPolicy

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
METHODS = ("rloo", "dr_grpo", "grpo", "reinforce_plus_plus_baseline")


def settings(length: int, correction: str = "practical", **changes) -> ObjectiveSettings:
    mode = changes.pop("loss_agg_mode", "seq-mean-token-sum-norm")
    return ObjectiveSettings(
        correction=correction, loss_agg_mode=mode, max_response_length=length, **changes
    )


class Scene:
    def __init__(self, vocabulary: int, length: int) -> None:
        self.space = SequenceSpace(vocabulary, length)
        policy = ToyPolicy(self.space, 4, seed=3)
        self.scores = policy.scores()
        self.gram = self.scores @ self.scores.T
        with torch.no_grad():
            behavior = policy.table(LayerSkipPlan.parse("1,2", 4))
            self.sampling = Sampling(self.space, policy.table(), behavior)
        # Completions that differ share a reward.
        values = torch.tensor([0.0, 0.5, 1.0, 0.5], dtype=torch.float64)
        self.rewards = values[torch.arange(self.space.num_sequences) % 4]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(2, 3)


def coin(chance: float) -> tuple[Sampling, Tensor]:
    """Two completions of one token, the end with this chance and the other; and their Gram
    matrix, as if the two had score functions of length 1 at right angles."""
    table = torch.tensor([[chance, 1.0 - chance]], dtype=torch.float64).log()
    return Sampling(SequenceSpace(2, 1), table, table), torch.eye(2, dtype=torch.float64)


def by_hand(
    scene: Scene, chosen: ObjectiveSettings, batch: GroupBatch, num_groups: int, teach: bool
) -> tuple[Tensor, float, float]:
    """Mean, mean square and chance over every ordered batch of so many groups, one call of the
    loss and of the advantages for each."""
    size, space = batch.group_size, scene.space
    mean, second, total = torch.zeros(scene.scores.shape[1], dtype=torch.float64), 0.0, 0.0
    for rows in itertools.product(range(space.num_sequences), repeat=size * num_groups):
        index = torch.tensor(rows)
        rewards = scene.rewards[index]
        if teach and bool(equal_groups(rewards, size).any()):
            continue
        advantages = group_relative_advantages(rewards, batch.method, group_size=size)
        tokens = token_gradients(scene.sampling, chosen, advantages, index)
        gradient = torch.einsum("rt,rtp->p", tokens, scene.scores[space.entries[index]])
        gradient = gradient / len(rows)
        weight = float(scene.sampling.probabilities[index].prod())
        mean, second = mean + weight * gradient, second + weight * float(gradient @ gradient)
        total += weight
    return mean / total, second / total, total


@pytest.mark.parametrize("teach", [False, True])
def test_several_groups_are_sums_over_every_batch(scene, teach):
    """REINFORCE++: the deviation is that of the whole batch, of the groups that are left in it."""
    chosen = settings(3, "trajectory")
    batch = GroupBatch("reinforce_plus_plus_baseline", 2, 2, max_refills=0 if teach else None)
    mean, second, _ = by_hand(scene, chosen, batch, 2, teach)
    if teach:
        one, one_second, teaches = by_hand(scene, chosen, batch, 1, teach)
        single = 2 * teaches * (1 - teaches)
        mean = teaches**2 * mean + single * one
        second = teaches**2 * second + single * one_second
    got = group_batch_moments(scene.sampling, chosen, batch, scene.rewards, scene.gram)
    torch.testing.assert_close(got.mean @ scene.scores, mean, **CLOSE)
    assert got.second == pytest.approx(second, rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 3])
def test_one_group_is_what_enumerating_groups_gives(scene, method, size):
    chosen = settings(3, "tis", correction_settings=CorrectionSettings(upper=1.2))

    def advantages(rewards: Tensor) -> Tensor:
        runs = rewards.split(size)
        return torch.cat([group_relative_advantages(r, method, group_size=size) for r in runs])

    want = group_moments(scene.sampling, chosen, advantages, scene.rewards, size, scene.gram)
    batch = GroupBatch(method, size, 1)
    got = group_batch_moments(scene.sampling, chosen, batch, scene.rewards, scene.gram)
    torch.testing.assert_close(got.mean, want.mean, **CLOSE)
    assert got.second == pytest.approx(want.second, rel=1e-10)


@pytest.mark.parametrize(("chance", "num_groups", "refills"), [(0.3, 1, 1), (0.9, 2, 3)])
def test_filtering_only_scales_leave_one_out(chance, num_groups, refills):
    """By hand: of two completions, rewarded 1 and 0, a pair teaches with chance q = 2p(1 - p), and
    leave-one-out is then +1 for the one and -1 for the other, over two completions. Unfiltered the
    mean is p(1 - p) of each. Filtered it is 1/2 where any pair teaches."""
    sampling, gram = coin(chance)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    unit = torch.tensor([1.0, -1.0], dtype=torch.float64)
    args = (rewards, gram)
    plain = GroupBatch("rloo", 2, num_groups)
    got = group_batch_moments(sampling, settings(1), plain, *args)
    torch.testing.assert_close(got.mean, chance * (1 - chance) * unit, **CLOSE)
    # The score functions of a row add up to 0, and the policy gradient is p(1 - p) of their
    # difference: without filtering there is no bias.
    on_policy = policy_gradient(sampling.space, sampling.target, rewards - chance)
    torch.testing.assert_close(got.mean, on_policy, **CLOSE)

    teaches = 2 * chance * (1 - chance)
    nothing = (1 - teaches) ** (num_groups * (refills + 1))
    filtered = GroupBatch("rloo", 2, num_groups, max_refills=refills)
    got = group_batch_moments(sampling, settings(1), filtered, *args)
    torch.testing.assert_close(got.mean, (1 - nothing) / 2 * unit, **CLOSE)
    # Every batch with a pair that teaches has the same gradient, of squared length 1/2.
    assert got.second == pytest.approx((1 - nothing) / 2, rel=1e-12)
    factor = (1 - nothing) / teaches
    assert factor > 1.2
    assert float((got.mean - on_policy).norm() / on_policy.norm()) == pytest.approx(factor - 1)


def test_reinforce_plus_plus_divides_by_the_deviation_of_the_batch():
    """By hand, one pair: deviations are +1/2 and -1/2, so is their spread: advantages +1, -1."""
    sampling, gram = coin(0.3)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    batch = GroupBatch("reinforce_plus_plus_baseline", 2, 1)
    got = group_batch_moments(sampling, settings(1), batch, rewards, gram)
    want = 0.21 * torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(got.mean, want, rtol=1e-5, atol=0)  # epsilon is 1e-6
    # Two pairs: with both mixed the spread is 1/2, with one of them sqrt(1/8).
    batch = GroupBatch("reinforce_plus_plus_baseline", 2, 2)
    got = group_batch_moments(sampling, settings(1), batch, rewards, gram)
    mixed = 0.42
    mean = mixed**2 / 2 + 2 * mixed * (1 - mixed) * 0.5 / math.sqrt(1 / 8) / 4
    assert float(got.mean[0]) == pytest.approx(mean, rel=1e-5)


def test_groups_that_never_teach_move_nothing():
    sampling, gram = coin(0.3)
    same = torch.ones(2, dtype=torch.float64)
    batch = GroupBatch("rloo", 2, 2, max_refills=3)
    got = group_batch_moments(sampling, settings(1), batch, same, gram)
    assert (got.mean.abs().max(), got.second) == (0, 0)


@pytest.mark.parametrize(
    "changes", [{"objective": "ppo_clip"}, {"loss_agg_mode": "token-mean"}], ids=str
)
def test_what_is_not_linear_in_advantages_is_refused(scene, changes):
    batch = GroupBatch("rloo", 2, 2)
    with pytest.raises(ValueError, match="batches of groups want reinforce"):
        group_batch_moments(
            scene.sampling, settings(3, **changes), batch, scene.rewards, scene.gram
        )


# --- mask_truncated, and rows of the atlas ---


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("size", [1, 2, 50])
def test_truncated_completions_leave_loss_and_denominator(mode, size):
    """By hand: of one token, what is not the end is cut off. What is left are ends, all of the same
    gradient, and batches without one have none."""
    sampling, gram = coin(0.3)
    space = sampling.space
    assert space.truncated.tolist() == [False, True]
    masked = Sampling(space, sampling.target, sampling.drawn_from, left_out=space.truncated)
    advantages = torch.tensor([0.7, -0.3], dtype=torch.float64)
    got = batch_moments(masked, settings(1, loss_agg_mode=mode), advantages, size, gram)
    some = 1 - 0.7**size
    assert got.mean.tolist() == pytest.approx([0.7 * some, 0.0], rel=1e-12)
    assert got.second == pytest.approx(0.49 * some, rel=1e-12)


def test_lambda_scales_retrace_and_damps_its_product_by_position(scene):
    rows = {row.name: row for row in estimators(3)}
    advantages = scene.rewards - 0.4

    def gradients(name: str) -> Tensor:
        return token_gradients(scene.sampling, rows[name].settings, advantages)

    plain, damped = gradients("retrace"), gradients(f"retrace, lambda {DAMPING:g}")
    torch.testing.assert_close(damped, DAMPING * plain, **CLOSE)
    undamped = settings(3, "retrace", correction_settings=CorrectionSettings(retrace_lambda=1.0))
    torch.testing.assert_close(
        token_gradients(scene.sampling, undamped, advantages), plain, rtol=0, atol=0
    )
    plain = gradients("retrace_cumulative")
    damped = gradients(f"retrace_cumulative, lambda {DAMPING:g}")
    powers = torch.tensor([DAMPING, DAMPING**2, DAMPING**3], dtype=torch.float64)
    torch.testing.assert_close(damped, plain * powers, **CLOSE)
    assert bool((plain[:, 1] != 0).any())
