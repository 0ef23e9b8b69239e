"""Which expected gradients are the on-policy one, by summing over every completion.

The policies are toy transformers in float64 whose layers are really skipped; the loss is the one
that training runs.
"""

import itertools
from dataclasses import replace
from functools import cache, partial
from random import Random

import pytest
import torch
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import group_relative_advantages
from nested_reft_mcore.algorithm.importance import CORRECTIONS, CorrectionSettings
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.analysis.exact_gradients import (
    Sampling,
    batch_moments,
    group_moments,
    policy_gradient,
    token_gradients,
)
from nested_reft_mcore.analysis.sequence_space import SequenceSpace
from nested_reft_mcore.analysis.toy_policy import ToyPolicy, truncated

EXACT = 1e-10
"""Relative error that summing in float64 is allowed."""
CONSTANT = "seq-mean-token-sum-norm"
OWN_LENGTH = "seq-mean-token-mean"
OBJECTIVES = ("reinforce", "ppo_clip", "cispo", "gspo")


class Toy:
    """A policy, its nested self under a plan, and everything there is to say."""

    def __init__(self, vocabulary: int, length: int, plan: str = "1,2", layers: int = 4) -> None:
        self.space = SequenceSpace(vocabulary, length)
        self.policy = ToyPolicy(self.space, layers, seed=vocabulary * 10 + length)
        self.scores = self.policy.scores()
        self.gram = torch.zeros(len(self.scores), len(self.scores), dtype=torch.float64)
        with torch.no_grad():
            target = self.policy.table()
            nested = self.policy.table(LayerSkipPlan.parse(plan, layers))
        self.sampling = Sampling(self.space, target, nested)
        self.rewards = self.space.verifiable_rewards() + 0.3 * self.space.graded_rewards()

    def settings(self, correction: str = "practical", **changes) -> ObjectiveSettings:
        mode = changes.pop("loss_agg_mode", CONSTANT)
        length = self.space.max_length
        return ObjectiveSettings(
            correction=correction, loss_agg_mode=mode, max_response_length=length, **changes
        )

    def on_policy(self, values: Tensor) -> Tensor:
        """Gradient of the mean of `values` over the full policy's own completions, by autograd."""
        mean = (self.space.probabilities(self.policy.table()) * values).sum()
        return self.policy.flat_gradient(mean)

    def expected(self, settings, values: Tensor | None = None, sampling=None) -> Tensor:
        """Expected gradient of one completion, by the parameters."""
        values = self.rewards if values is None else values
        moments = batch_moments(sampling or self.sampling, settings, values, 1, self.gram)
        return moments.mean @ self.scores

    def expected_of_group(self, settings, advantages_of, size: int, sampling=None) -> Tensor:
        args = (advantages_of, self.rewards, size, self.gram)
        return group_moments(sampling or self.sampling, settings, *args).mean @ self.scores


toy = cache(Toy)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


PLANS = [(3, 5, "1"), (3, 5, "1,2"), (4, 4, "0.attention,2.mlp"), (5, 3, "1,2"), (4, 2, "0,1,2,3")]


@pytest.mark.parametrize(("vocabulary", "length", "plan"), PLANS)
def test_trajectory_is_unbiased_for_a_constant_denominator(vocabulary, length, plan):
    case = toy(vocabulary, length, plan)
    settings = case.settings("trajectory")
    want = case.on_policy(case.rewards) / length
    assert error(case.expected(settings), want) < EXACT
    assert error(case.expected(settings, case.rewards - 0.7), want) < EXACT, "a baseline is free"


@pytest.mark.parametrize(("vocabulary", "length", "plan"), PLANS)
def test_trajectory_is_unbiased_where_each_sequence_is_divided_by_its_own_length(
    vocabulary, length, plan
):
    """It is then the gradient of the mean reward per token of its completion."""
    case = toy(vocabulary, length, plan)
    got = case.expected(case.settings("trajectory", loss_agg_mode=OWN_LENGTH))
    assert error(got, case.on_policy(case.rewards / case.space.lengths)) < EXACT


@pytest.mark.parametrize(("size", "vocabulary", "length"), [(2, 3, 5), (2, 4, 4), (3, 3, 3)])
def test_trajectory_is_unbiased_with_leave_one_out_baselines(size, vocabulary, length):
    """Every group of two or three completions, advantages of the code that training runs."""
    case = toy(vocabulary, length)
    rloo = partial(group_relative_advantages, method="rloo", group_size=size)
    got = case.expected_of_group(case.settings("trajectory"), rloo, size)
    assert error(got, case.on_policy(case.rewards) / length) < EXACT


def test_leave_one_out_beside_a_denominator_of_its_own_takes_the_behaviors_mean_for_a_baseline():
    """Divided by its own length, a completion's baseline no longer averages out: off-policy it is
    the mean reward of the behavior policy. That is exactly what differs from on-policy."""
    case = toy(3, 5)
    rloo = partial(group_relative_advantages, method="rloo", group_size=2)
    settings = case.settings("trajectory", loss_agg_mode=OWN_LENGTH)
    got = case.expected_of_group(settings, rloo, 2)
    lengths, drawn = case.space.lengths, case.sampling.probabilities
    baseline = (drawn * case.rewards).sum()
    assert error(got, case.on_policy((case.rewards - baseline) / lengths)) < EXACT
    on_policy = case.expected_of_group(settings, rloo, 2, case.sampling.on_policy())
    assert error(got, on_policy) > 1e-3


@pytest.mark.parametrize("objective", ["ppo_clip", "cispo", "gspo"])
def test_trajectory_is_unbiased_beside_every_decoupled_objective_at_its_first_step(objective):
    case = toy(3, 5)
    got = case.expected(case.settings("trajectory", objective=objective))
    assert error(got, case.on_policy(case.rewards) / 5) < EXACT


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.8}])
def test_trajectory_is_biased_where_the_behavior_never_goes(truncation):
    """What is missing is what the target does outside of the behavior's support, to the digit."""
    case = toy(4, 4)
    cut = truncated(case.sampling.drawn_from, **truncation)
    sampling = Sampling(case.space, case.sampling.target, cut)
    got = case.expected(case.settings("trajectory"), sampling=sampling)
    want = case.on_policy(case.rewards) / 4
    assert error(got, want) > 0.05
    reached = sampling.probabilities > 0
    assert not bool(reached.all())
    missing = policy_gradient(case.space, case.sampling.target, case.rewards * ~reached)
    assert error(got + missing @ case.scores / 4, want) < EXACT


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.8}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trajectory_is_unbiased_where_the_target_never_goes_but_the_behavior_does(
    objective, truncation
):
    """Support strictly inside: such completions have ratio 0, and their -inf reaches nothing."""
    case = toy(4, 4)
    cut = truncated(case.sampling.target, **truncation)
    sampling = Sampling(case.space, cut, case.sampling.drawn_from)
    never = case.space.probabilities(cut) == 0
    assert bool((sampling.probabilities[never] > 0).any())
    by_length = case.rewards / case.space.lengths
    for mode, values in ((CONSTANT, case.rewards / 4), (OWN_LENGTH, by_length)):
        settings = case.settings("trajectory", objective=objective, loss_agg_mode=mode)
        got = batch_moments(sampling, settings, case.rewards, 1, case.gram).mean
        assert error(got, policy_gradient(case.space, cut, values)) < EXACT


# --- prefix ---


def action_values(case: Toy, behavior: Tensor) -> Tensor:
    """`[prefixes, vocabulary]`: mean reward after a token, the behavior policy going on."""
    space, found = case.space, {}
    reward = dict(zip(space.sequences, case.rewards.tolist(), strict=True))
    number = {prefix: i for i, prefix in enumerate(space.prefixes)}

    def value(prefix: tuple[int, ...]) -> float:
        row = behavior[number[prefix]].exp().tolist()
        found[prefix] = [
            reward[(*prefix, a)] if (*prefix, a) in reward else value((*prefix, a))
            for a in range(space.vocabulary)
        ]
        return sum(p * q for p, q in zip(row, found[prefix], strict=True))

    value(())
    return torch.tensor([found[prefix] for prefix in space.prefixes], dtype=torch.float64)


def reach(case: Toy, table: Tensor) -> Tensor:
    """`[prefixes]`: probability that a policy comes by."""
    space = case.space
    number = {prefix: i for i, prefix in enumerate(space.prefixes)}
    found = torch.ones(len(space.prefixes), dtype=torch.float64)
    for i, prefix in enumerate(space.prefixes):
        if prefix:
            found[i] = found[number[prefix[:-1]]] * table[number[prefix[:-1]], prefix[-1]].exp()
    return found


@pytest.mark.parametrize(("vocabulary", "length", "plan"), PLANS[:4])
def test_prefix_is_the_gradient_with_the_behaviors_action_values(vocabulary, length, plan):
    """Computed the other way round: over states and actions, values by recursion from the end."""
    case = toy(vocabulary, length, plan)
    target, nested = case.sampling.target, case.sampling.drawn_from
    occupancy = reach(case, target)[:, None] * target.exp()
    want = (occupancy * action_values(case, nested)).flatten() @ case.scores / length
    got = case.expected(case.settings("prefix"))
    assert error(got, want) < EXACT
    assert error(got, case.on_policy(case.rewards) / length) > 0.01, "not with the target's"


def test_prefix_is_unbiased_for_rewards_that_nothing_later_changes():
    case = toy(3, 5)
    first = torch.tensor([float(y[0] == 1) - 0.3 * (y[0] == 2) for y in case.space.sequences])
    settings = case.settings("prefix")
    assert (
        error(case.expected(settings, first.double()), case.on_policy(first.double()) / 5) < EXACT
    )


@pytest.mark.parametrize("decided", [1, 2, 3])
def test_prefix_is_right_from_the_token_that_decides_the_reward(decided):
    """A reward that the first `decided` tokens fix: the gradient of the tokens before the last of
    these is biased, of that one and later ones exact."""
    case = toy(3, 5)
    space = case.space
    random, prefixes = Random(7), sorted({y[:decided] for y in space.sequences})
    reward = {prefix: random.gauss(0, 1) for prefix in prefixes}
    values = torch.tensor([reward[y[:decided]] for y in space.sequences], dtype=torch.float64)
    off = token_gradients(case.sampling, case.settings("prefix"), values)
    on = token_gradients(case.sampling.on_policy(), case.settings(), values)
    weights = case.sampling.probabilities, case.sampling.on_policy().probabilities
    for t in range(space.max_length):
        got, want = (
            torch.einsum("n,np->p", (w * g[:, t]), case.scores[space.entries[:, t]])
            for w, g in zip(weights, (off, on), strict=True)
        )
        if t < decided - 1:
            assert error(got, want) > 1e-3
        else:
            assert float((got - want).norm()) < EXACT * float(case.on_policy(values).norm())


# --- what is not unbiased, and what all are on-policy ---


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_policy_every_correction_and_objective_is_the_policy_gradient(name, objective):
    case = toy(3, 5)
    settings = case.settings(name, objective=objective)
    got = case.expected(settings, sampling=case.sampling.on_policy())
    assert error(got, case.on_policy(case.rewards) / 5) < EXACT


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_on_policy_bypass_is_the_policy_gradient(objective):
    case = toy(3, 5)
    settings = case.settings(objective=objective, bypass_mode=True)
    got = case.expected(settings, sampling=case.sampling.on_policy())
    assert error(got, case.on_policy(case.rewards) / 5) < EXACT


def test_on_policy_lambda_scales_retrace():
    case = toy(3, 5)
    settings = case.settings("retrace", correction_settings=CorrectionSettings(retrace_lambda=0.8))
    got = case.expected(settings, sampling=case.sampling.on_policy())
    assert error(got, 0.8 * case.on_policy(case.rewards) / 5) < EXACT


@pytest.mark.parametrize("name", ["base", "prefix", "trajectory", "tis", "icepop", "geometric"])
def test_for_one_token_every_ratio_is_the_same_and_unbiased(name):
    case = toy(5, 1)
    got = case.expected(case.settings(name))
    assert error(got, case.on_policy(case.rewards)) < EXACT


BIASED = {name: {} for name in CORRECTIONS if name != "trajectory"} | {
    "tis": {"upper": 1.5},
    "icepop": {"lower": 0.5, "upper": 2.0},
    "truncated trajectory": {"upper": 1.5},
}


@pytest.mark.parametrize("name", BIASED)
def test_no_other_correction_is_unbiased_for_several_tokens(name):
    case = toy(3, 5)
    bounds = CorrectionSettings(**BIASED[name])
    settings = case.settings(name.split()[-1], correction_settings=bounds)
    assert error(case.expected(settings), case.on_policy(case.rewards) / 5) > 0.02


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_clipped_ratios_in_bypass_are_biased_at_the_first_step_already(objective):
    case = toy(3, 5)
    settings = case.settings(objective=objective, bypass_mode=True)
    assert error(case.expected(settings), case.on_policy(case.rewards) / 5) > 0.02


def cosine(left: Tensor, right: Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))


def test_the_batchs_token_count_biases_even_on_policy_and_less_in_larger_batches():
    case = toy(3, 5)
    want, found = case.on_policy(case.rewards), []
    for size in (1, 8, 512):
        settings = replace(case.settings(), loss_agg_mode="token-mean")
        sampling = case.sampling.on_policy()
        mean = batch_moments(sampling, settings, case.rewards, size, case.gram).mean
        found.append(1 - cosine(mean @ case.scores, want))
    assert found[0] > 1e-3 > found[2]
    assert found[0] > found[1] > found[2] > 0


@pytest.mark.parametrize("size", [2, 3])
def test_dr_grpo_is_unbiased_up_to_the_share_of_the_siblings(size):
    """r - mean counts the completion itself: (G - 1) / G of leave-one-out, whatever the policy."""
    case = toy(3, 3)
    advantages = partial(group_relative_advantages, method="dr_grpo", group_size=size)
    got = case.expected_of_group(case.settings("trajectory"), advantages, size)
    assert error(got, (size - 1) / size * case.on_policy(case.rewards) / 3) < EXACT


@pytest.mark.parametrize("size", [2, 3])
def test_division_by_the_groups_deviation_turns_the_gradient_even_on_policy(size):
    case = toy(3, 3)
    advantages = partial(group_relative_advantages, method="grpo", group_size=size)
    sampling = case.sampling.on_policy()
    got = case.expected_of_group(case.settings(), advantages, size, sampling)
    assert cosine(got, case.on_policy(case.rewards)) < 1 - 1e-4


# --- KL to a reference, in the loss ---


def kl_gradient(case: Toy, visits: Tensor, forward: bool) -> Tensor:
    """Of KL(target || ref), or of KL(ref || target), at each prefix times its visits."""
    table = case.policy.table()
    ref = case.sampling.drawn_from.roll(1, dims=0)
    if forward:
        divergence = (table.exp() * (table - ref)).sum(dim=1)
    else:
        divergence = (ref.exp() * (ref - table)).sum(dim=1)
    return case.policy.flat_gradient((visits * divergence).sum())


def expected_kl_gradient(case: Toy, sampling: Sampling, settings: ObjectiveSettings) -> Tensor:
    space = case.space
    target = space.logprobs(sampling.target).requires_grad_()
    inputs = LossInputs(
        target_logprobs=target,
        behavior_logprobs=space.logprobs(sampling.drawn_from),
        ref_logprobs=space.logprobs(case.sampling.drawn_from.roll(1, dims=0)),
        advantages=torch.zeros(space.num_sequences, dtype=torch.float64),
        response_mask=space.mask,
    )
    (gradient,) = torch.autograd.grad(policy_loss(inputs, settings).loss_sum, target)
    weighted = gradient * sampling.probabilities[:, None] * space.max_length
    return torch.einsum("nt,ntp->p", weighted, case.scores[space.entries])


@pytest.mark.parametrize(("kind", "forward"), [("k2", True), ("k3", False)])
def test_on_policy_kl_losses_have_the_gradients_that_are_said_of_them(kind, forward):
    case = toy(3, 4)
    sampling = case.sampling.on_policy()
    settings = case.settings(kl_loss_coef=1.0, kl_loss_type=kind)
    want = kl_gradient(case, reach(case, sampling.target), forward)
    assert error(expected_kl_gradient(case, sampling, settings), want) < EXACT


def test_on_policy_k1_as_a_loss_moves_nothing():
    case = toy(3, 4)
    settings = case.settings(kl_loss_coef=1.0, kl_loss_type="k1")
    got = expected_kl_gradient(case, case.sampling.on_policy(), settings)
    scale = kl_gradient(case, reach(case, case.sampling.target), forward=True).norm()
    assert float(got.norm()) < EXACT * float(scale)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_corrected_kl_is_exact_off_policy_at_the_states_that_are_visited(kind):
    case = toy(3, 4)
    visits = reach(case, case.sampling.drawn_from)
    want = kl_gradient(case, visits, forward=True)
    settings = case.settings(kl_loss_coef=1.0, kl_loss_type=kind, kl_corrected=True)
    assert error(expected_kl_gradient(case, case.sampling, settings), want) < EXACT
    plain = replace(settings, kl_corrected=False)
    assert error(expected_kl_gradient(case, case.sampling, plain), want) > 0.02


def test_plans_of_these_tests_are_off_policy_enough_to_tell():
    """Every case above has a behavior policy at a distance that a wrong weight would show."""
    for vocabulary, length, plan in itertools.islice(PLANS, 4):
        case = toy(vocabulary, length, plan)
        drawn, target = (
            case.space.probabilities(t) for t in (case.sampling.drawn_from, case.sampling.target)
        )
        assert float((drawn - target).abs().sum() / 2) > 0.05
