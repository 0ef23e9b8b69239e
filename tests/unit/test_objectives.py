"""Objectives on small examples that can be followed by hand."""

import math

import jaxtyping
import pytest
import torch

from nested_reft_mcore.algorithm.diagnostics import finalize_metrics
from nested_reft_mcore.algorithm.importance import CorrectionSettings
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss

LOG2 = math.log(2)


def one_token(ratio, advantage, **settings):
    """Loss and gradient of a single token whose PPO ratio is `ratio`, old policy = behavior."""
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    target = (old + math.log(ratio)).requires_grad_()
    inputs = LossInputs(
        target_logprobs=target,
        behavior_logprobs=old,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        response_mask=torch.ones(1, 1, dtype=torch.bool),
        old_logprobs=old,
    )
    output = policy_loss(inputs, ObjectiveSettings(objective="ppo_clip", **settings))
    output.loss_sum.backward()
    clipped = finalize_metrics(output.metrics)["actor/pg_clipfrac"]
    assert target.grad is not None
    return output.loss_sum.item(), target.grad.item(), clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 1.0, -1.1, -1.1, 0.0),  # inside
        (2.0, 1.0, -1.3, 0.0, 1.0),  # too likely already: stop pushing
        (2.0, -1.0, 2.0, 2.0, 0.0),  # too likely and bad: keep pushing down
        (0.5, -1.0, 0.9, 0.0, 1.0),  # unlikely already: stop pushing
        (0.5, 1.0, -0.5, -0.5, 0.0),  # unlikely and good: keep pushing up
    ],
)
@pytest.mark.parametrize("bypass_mode", [False, True])
def test_ppo_clips_on_the_pessimistic_side(ratio, advantage, loss, gradient, clipped, bypass_mode):
    got = one_token(
        ratio, advantage, clip_ratio_low=0.1, clip_ratio_high=0.3, bypass_mode=bypass_mode
    )
    assert got == pytest.approx((loss, gradient, clipped))


def inputs_of(target, behavior, old=None, advantages=(2.0,), **rest):
    def table(values):
        return torch.tensor([values], dtype=torch.float64)

    return LossInputs(
        target_logprobs=table(target).requires_grad_(),
        behavior_logprobs=table(behavior),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        response_mask=torch.ones(1, len(target), dtype=torch.bool),
        old_logprobs=None if old is None else table(old),
        **rest,
    )


@pytest.mark.parametrize(
    ("correction", "weights"),
    [("practical", (1.0, 1.0)), ("base", (2.0, 0.5)), ("retrace", (0.9, 0.45))],
)
def test_reinforce_weights_each_token(correction, weights):
    inputs = inputs_of([-1.0, -2.0], [-1.0 - LOG2, -2.0 + LOG2])
    settings = ObjectiveSettings(
        correction=correction, correction_settings=CorrectionSettings(retrace_lambda=0.9)
    )
    output = policy_loss(inputs, settings)
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(2 * weights[0] * 1.0 + 2 * weights[1] * 2.0)
    assert inputs.target_logprobs.grad is not None
    assert inputs.target_logprobs.grad[0].tolist() == pytest.approx([-2 * w for w in weights])
    assert output.denominator.dtype == torch.int64
    assert int(output.denominator) == 2


def test_decoupled_ppo_corrects_old_over_behavior():
    """Target equals old here, so the PPO ratio is 1 and only the correction shows."""
    inputs = inputs_of([-1.0], [-1.0 - LOG2], old=[-1.0], advantages=(3.0,))
    settings = ObjectiveSettings(objective="ppo_clip", correction="base")
    output = policy_loss(inputs, settings)
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(-6.0)
    assert inputs.target_logprobs.grad is not None
    assert inputs.target_logprobs.grad.item() == pytest.approx(-6.0)
    metrics = finalize_metrics(output.metrics, output.maxima)
    assert metrics["actor/ppo_kl"] == 0.0
    assert metrics["rollout_corr/rollout_is_max"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "settings",
    [
        ObjectiveSettings(correction="base"),
        ObjectiveSettings(correction="retrace"),
        ObjectiveSettings(objective="ppo_clip", correction="base"),
        ObjectiveSettings(objective="ppo_clip", bypass_mode=True),
    ],
)
def test_non_finite_tokens_leave_loss_and_denominator(settings):
    nan = float("nan")
    inputs = inputs_of(
        [-1.0, -1.0, nan, -1.0], [-1.0, nan, -1.0, -float("inf")], old=[-1.0, -1.0, -1.0, -1.0]
    )
    # Decoupled PPO never looks at target / behavior: it loses tokens by old / behavior and
    # target / old, which are the same three.
    output = policy_loss(inputs, settings)
    output.loss_sum.backward()
    assert int(output.denominator) == 1
    assert output.metrics.sums["nested/num_non_finite_ratios"].item() == 3
    assert set(output.log_ratios.tolist()) == {0.0}
    assert math.isfinite(output.loss_sum.item())
    assert inputs.target_logprobs.grad is not None
    assert inputs.target_logprobs.grad[0, 1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("objective", ["reinforce", "ppo_clip", "cispo", "gspo"])
def test_a_token_without_a_finite_entropy_leaves_loss_and_denominator(objective):
    entropy = torch.tensor([[0.5, math.nan, math.inf]], dtype=torch.float64, requires_grad=True)
    logprobs = [-1.0, -2.0, -3.0]
    inputs = inputs_of(logprobs, logprobs, old=logprobs, entropy=entropy)
    output = policy_loss(inputs, ObjectiveSettings(objective=objective, entropy_coeff=0.1))
    output.loss_sum.backward()
    alone = inputs_of([-1.0], [-1.0], old=[-1.0], entropy=entropy[:, :1].detach())
    expected = policy_loss(alone, ObjectiveSettings(objective=objective, entropy_coeff=0.1))
    assert output.loss_sum.item() == pytest.approx(expected.loss_sum.item())
    assert int(output.denominator) == 1
    assert output.metrics.sums["nested/num_non_finite_ratios"].item() == 2
    assert finalize_metrics(output.metrics)["actor/entropy"] == 0.5
    assert entropy.grad is not None
    assert entropy.grad[0].tolist() == [-0.1, 0.0, 0.0]
    assert inputs.target_logprobs.grad is not None
    assert inputs.target_logprobs.grad[0, 1:].tolist() == [0.0, 0.0]


def test_entropy_is_reported_without_gradient():
    entropy = torch.tensor([[0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    output = policy_loss(
        inputs_of([-1.0, -2.0], [-1.0, -2.0], entropy=entropy), ObjectiveSettings()
    )
    metrics = finalize_metrics(output.metrics)
    assert metrics["actor/entropy"] == 1.0
    assert not any(torch.is_tensor(v) and v.requires_grad for v in output.metrics.sums.values())


def test_a_fully_masked_batch_adds_nothing():
    inputs = LossInputs(
        target_logprobs=torch.full((2, 3), float("nan"), requires_grad=True),
        behavior_logprobs=torch.zeros(2, 3),
        advantages=torch.full((2,), float("nan")),
        response_mask=torch.zeros(2, 3, dtype=torch.bool),
    )
    output = policy_loss(inputs, ObjectiveSettings())
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0
    assert int(output.denominator) == 0
    assert inputs.target_logprobs.grad is not None
    assert bool((inputs.target_logprobs.grad == 0).all())


def test_contradictory_settings_are_refused():
    with pytest.raises(ValueError, match="would count target / behavior twice"):
        ObjectiveSettings(objective="ppo_clip", correction="base", bypass_mode=True)
    with pytest.raises(ValueError, match="bypass_mode chooses a clipped ratio"):
        ObjectiveSettings(objective="reinforce", bypass_mode=True)
    with pytest.raises(ValueError, match="unknown correction 'tiss'"):
        ObjectiveSettings(correction="tiss")
    with pytest.raises(ValueError, match="cannot be negative"):
        ObjectiveSettings(clip_ratio_low=-0.1)
    with pytest.raises(ValueError, match="needs old_logprobs"):
        policy_loss(inputs_of([-1.0], [-1.0]), ObjectiveSettings(objective="ppo_clip"))


@pytest.fixture
def unchecked_shapes():
    """As in production, where annotations are not checked at run time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"behavior_logprobs has shape \(1, 1\)"):
        inputs_of([-1.0, -1.0], [-1.0])
    with pytest.raises(ValueError, match=r"advantages has shape \(2,\), expected \(1,\)"):
        inputs_of([-1.0], [-1.0], advantages=(1.0, 2.0))
