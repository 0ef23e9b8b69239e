"""The machinery behind the atlas: every completion, toy policies that skip layers, moments."""

import itertools

import pytest
import torch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.objectives import ObjectiveSettings
from nested_reft_mcore.algorithm.rejection import RejectionRule
from nested_reft_mcore.analysis.exact_gradients import (
    Sampling,
    batch_moments,
    denominators,
    dot,
    group_moments,
    policy_gradient,
    token_gradients,
)
from nested_reft_mcore.analysis.sequence_space import END, SequenceSpace
from nested_reft_mcore.analysis.toy_policy import ToyPolicy, at_temperature, truncated

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


@pytest.mark.parametrize(("vocabulary", "length"), [(2, 1), (3, 3), (4, 2), (5, 4)])
def test_every_completion_is_listed_once_and_ends_where_it_should(vocabulary, length):
    space = SequenceSpace(vocabulary, length)
    assert len(set(space.sequences)) == len(space.sequences) == space.num_sequences
    for sequence in space.sequences:
        assert (sequence[-1] == END) or len(sequence) == length
        assert END not in sequence[:-1]
    table = ToyPolicy(space, 2, seed=0).table().detach()
    assert float(space.probabilities(table).sum()) == pytest.approx(1.0, abs=1e-14)


def test_a_space_that_cannot_be_listed_is_refused():
    with pytest.raises(ValueError, match="make 6725601 completions; at most 4096"):
        SequenceSpace(8, 8)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        SequenceSpace(1, 3)


@pytest.fixture(scope="module")
def space() -> SequenceSpace:
    return SequenceSpace(3, 3)


def test_a_row_of_the_table_is_what_follows_its_prefix_alone(space):
    """No look at the padding, nor at later tokens."""
    policy = ToyPolicy(space, 3, seed=5)
    table = policy.table()
    for row, prefix in zip(table, space.prefixes, strict=True):
        alone = policy(torch.tensor([space.vocabulary, *prefix]), LayerSkipPlan.full(3))[-1]
        torch.testing.assert_close(row, alone, **CLOSE)


def test_skipped_parts_do_not_run_and_have_no_gradient(space):
    policy = ToyPolicy(space, 4, seed=1)
    plan = LayerSkipPlan.parse("1,2.attention", 4)
    with torch.no_grad():
        before = policy.table(plan).clone()
        for skipped in (
            *policy.layers[1].parameters(),
            policy.layers[2].qkv,
            policy.layers[2].proj,
        ):
            skipped.fill_(torch.nan)
        torch.testing.assert_close(policy.table(plan), before, rtol=0, atol=0)
        assert not policy.table(LayerSkipPlan.parse("1", 4)).isfinite().all()
    policy = ToyPolicy(space, 4, seed=1)
    assert not torch.equal(policy.table(plan), policy.table())
    policy.table(plan).exp()[:, 0].sum().backward()
    unused = [*policy.layers[1].parameters(), policy.layers[2].qkv, policy.layers[2].proj]
    assert all(parameter.grad is None for parameter in unused)
    assert bool((policy.layers[2].up.grad != 0).any())
    with pytest.raises(ValueError, match="a plan of 3 layers for 4"):
        policy.table(LayerSkipPlan.full(3))


def test_scores_are_the_gradients_of_the_table(space):
    policy = ToyPolicy(space, 3, seed=2)
    scores, entries = policy.scores(), policy.table().flatten()
    for index in range(entries.numel()):
        want = policy.flat_gradient(policy.table().flatten()[index])
        torch.testing.assert_close(scores[index], want, **CLOSE)


def test_truncation_keeps_the_likeliest_and_renormalises():
    table = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    torch.testing.assert_close(
        truncated(table, top_k=2).exp()[0], table.new_tensor([5, 3, 0, 0]) / 8
    )
    kept = truncated(table, top_p=0.9).exp()[0]
    torch.testing.assert_close(kept, table.new_tensor([0.5, 0.3, 0.15, 0]) / 0.95)
    assert truncated(table, top_p=0.1).exp()[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    want = table.exp().square() / table.exp().square().sum()
    torch.testing.assert_close(at_temperature(table, 0.5).exp(), want)


# --- moments, against sums over explicit batches ---


class Scene:
    def __init__(self, space: SequenceSpace) -> None:
        policy = ToyPolicy(space, 4, seed=3)
        self.space, self.scores = space, policy.scores()
        self.gram = self.scores @ self.scores.T
        with torch.no_grad():
            behavior = policy.table(LayerSkipPlan.parse("1,2", 4))
            self.sampling = Sampling(space, policy.table(), behavior)
        self.advantages = space.graded_rewards() - 0.4
        self.policy = policy


@pytest.fixture(scope="module")
def scene(space) -> Scene:
    return Scene(space)


def test_the_policy_gradient_is_that_of_the_expected_reward(scene):
    space, rewards = scene.space, scene.space.graded_rewards()
    value = (space.probabilities(scene.policy.table()) * rewards).sum()
    got = policy_gradient(space, scene.sampling.target, rewards) @ scene.scores
    torch.testing.assert_close(got, scene.policy.flat_gradient(value), **CLOSE)


RAGGED = [
    ObjectiveSettings(correction="base"),
    ObjectiveSettings(correction="base", rejections=(RejectionRule("token_k1", 1.1),)),
    ObjectiveSettings(
        correction="trajectory",
        loss_agg_mode="seq-mean-token-mean",
        rejections=(RejectionRule("seq_sum_k1", 1.15),),
    ),
    ObjectiveSettings(loss_agg_mode="seq-mean-token-sum-norm", max_response_length=3),
]


@pytest.mark.parametrize("settings", RAGGED, ids=lambda s: f"{s.loss_agg_mode}{len(s.rejections)}")
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_moments_are_sums_over_all_batches(scene, settings, batch_size):
    """Every ordered batch of one, two and three completions, one after the other."""
    space, sampling = scene.space, scene.sampling
    shares = denominators(sampling, settings)
    assert (0 in shares) == bool(settings.rejections), "some batches must lose all of their tokens"
    every = range(space.num_sequences)
    batches = torch.tensor(list(itertools.product(every, repeat=batch_size)))
    rows = batches.flatten()
    gradients = token_gradients(sampling, settings, scene.advantages[rows], rows)
    single = torch.einsum("rt,rtp->rp", gradients, scene.scores[space.entries[rows]])
    summed = single.reshape(*batches.shape, -1).sum(dim=1)
    gradients = summed / shares[batches].sum(dim=1).clamp(min=1)[:, None]
    weights = sampling.probabilities[batches].prod(dim=1)
    mean, second = weights @ gradients, float(weights @ gradients.square().sum(dim=1))

    got = batch_moments(sampling, settings, scene.advantages, batch_size, scene.gram)
    torch.testing.assert_close(got.mean @ scene.scores, mean, **CLOSE)
    assert got.second == pytest.approx(second, rel=1e-10)
    assert got.variance(scene.gram) == pytest.approx(second - float(mean @ mean), rel=1e-9)
    reference = policy_gradient(space, sampling.target, scene.advantages)
    bias = mean - reference @ scene.scores
    want = float(bias @ bias) + second - float(mean @ mean)
    assert got.squared_error(reference, scene.gram) == pytest.approx(want, rel=1e-9)


def test_large_batches_average_out(scene):
    """With a constant denominator variance falls as 1 / batch, and bias stays."""
    settings = RAGGED[-1]
    one, many = (
        batch_moments(scene.sampling, settings, scene.advantages, size, scene.gram)
        for size in (1, 1000)
    )
    torch.testing.assert_close(one.mean, many.mean, **CLOSE)
    assert many.variance(scene.gram) == pytest.approx(one.variance(scene.gram) / 1000, rel=1e-8)


def test_one_call_for_all_rows_is_one_call_for_each(scene):
    """What lets the enumeration put all completions into one micro-batch."""
    for settings in RAGGED:
        whole = token_gradients(scene.sampling, settings, scene.advantages)
        for row in torch.arange(scene.space.num_sequences).split(1):
            alone = token_gradients(scene.sampling, settings, scene.advantages[row], row)
            torch.testing.assert_close(alone, whole[row], **CLOSE)


def test_group_moments_see_advantages_of_the_whole_group(scene):
    """With advantages that ignore the siblings a group is a batch."""
    settings = RAGGED[-1]
    rewards = scene.space.graded_rewards()
    args = (scene.sampling, settings)
    group = group_moments(*args, lambda r: r - 0.4, rewards, 2, scene.gram)
    batch = batch_moments(*args, rewards - 0.4, 2, scene.gram)
    torch.testing.assert_close(group.mean, batch.mean, **CLOSE)
    assert group.second == pytest.approx(batch.second, rel=1e-10)
    # And with those that do, it is the sum over groups by hand.
    paired = group_moments(
        *args, lambda r: r - r.reshape(-1, 2).flip(1).flatten(), rewards, 2, scene.gram
    )
    drawn, length = scene.sampling.probabilities, 3
    ones = token_gradients(scene.sampling, settings, torch.ones_like(drawn)) * length
    mean = drawn @ rewards
    by_hand = torch.einsum(
        "n,nt,ntp->p",
        drawn * (rewards - mean) / length,
        ones,
        scene.scores[scene.space.entries],
    )
    torch.testing.assert_close(paired.mean @ scene.scores, by_hand, **CLOSE)
    assert dot(paired.mean, paired.mean, scene.gram) == pytest.approx(float(by_hand @ by_hand))
