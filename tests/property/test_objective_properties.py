"""What holds for every batch: no leak from masked positions, no trace of how a batch was split."""

import math
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.aggregation import LossAggMode
from nested_reft_mcore.algorithm.counter_random import permutation
from nested_reft_mcore.algorithm.diagnostics import MetricSums, finalize_metrics, ratio_p05
from nested_reft_mcore.algorithm.importance import CorrectionSettings
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.algorithm.rejection import RejectionRule

POISON = (float("nan"), float("inf"), -float("inf"), 1e300)

all_settings = st.one_of(
    st.builds(
        ObjectiveSettings,
        objective=st.sampled_from(["reinforce", "ppo_clip"]),
        correction=st.sampled_from(["practical", "base", "retrace"]),
        correction_settings=st.builds(CorrectionSettings, retrace_lambda=st.floats(0, 1)),
        log_ratio_clamp=st.sampled_from([0.3, 5.0, 20.0]),
        clip_ratio_low=st.sampled_from([0.0, 0.2, 0.9]),
        clip_ratio_high=st.sampled_from([0.0, 0.28, 3.0]),
    ),
    st.just(ObjectiveSettings(objective="ppo_clip", bypass_mode=True)),
)
REJECTIONS = (
    (),
    (RejectionRule("token_k1", 1.5),),
    (RejectionRule("seq_mean_k3", 0.2), RejectionRule("token_k2", 0.5)),
)
sequence_settings = st.builds(
    ObjectiveSettings,
    objective=st.sampled_from(["reinforce", "ppo_clip", "gspo", "cispo"]),
    correction=st.sampled_from(["retrace", "trajectory", "geometric", "prefix"]),
    rejections=st.sampled_from(REJECTIONS),
    loss_agg_mode=st.sampled_from(get_args(LossAggMode)),
    max_response_length=st.just(6),
)


@st.composite
def loss_inputs(draw):
    """A float64 batch of up to 5 completions of up to 6 tokens, masks of any kind."""
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    target = -normal(*shape).abs() * 2
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return LossInputs(
        target_logprobs=target,
        behavior_logprobs=target + normal(*shape) * draw(st.sampled_from([0.0, 0.3, 3.0])),
        advantages=normal(shape[0]),
        response_mask=torch.rand(*shape, generator=generator) < density,
        old_logprobs=target + normal(*shape) * draw(st.sampled_from([0.0, 0.2])),
        ref_logprobs=target + normal(*shape) * draw(st.sampled_from([0.0, 0.5])),
        entropy=normal(*shape).abs(),
    )


def evaluate(inputs, settings):
    """Loss, tokens, gradient, metrics and ratio_p05 of a batch."""
    target = inputs.target_logprobs.detach().clone().requires_grad_()
    output = policy_loss(replace(inputs, target_logprobs=target), settings)
    output.loss_sum.backward()
    assert target.grad is not None
    return output, target.grad


def rows(inputs, index):
    return LossInputs(**{f.name: getattr(inputs, f.name)[index] for f in fields(inputs)})


@given(loss_inputs(), all_settings | sequence_settings, st.data())
def test_masked_positions_influence_nothing(inputs, settings, data):
    hidden = ~inputs.response_mask
    poisons = st.sampled_from(POISON)

    def poisoned(values):
        return torch.where(hidden, torch.full_like(values, data.draw(poisons)), values)

    names = ("target_logprobs", "behavior_logprobs", "old_logprobs", "entropy")
    dirty = replace(inputs, **{name: poisoned(getattr(inputs, name)) for name in names})
    unused = hidden.all(dim=1)
    dirty = replace(dirty, advantages=dirty.advantages.masked_fill(unused, data.draw(poisons)))
    clean_output, clean_gradient = evaluate(inputs, settings)
    dirty_output, dirty_gradient = evaluate(dirty, settings)
    assert torch.equal(clean_output.loss_sum, dirty_output.loss_sum)
    assert torch.equal(clean_gradient, dirty_gradient)
    assert bool((dirty_gradient[hidden] == 0).all())
    assert int(clean_output.denominator) == int(dirty_output.denominator)
    if settings.loss_agg_mode == "token-mean" and not settings.rejections:
        assert int(dirty_output.denominator) == int(inputs.response_mask.sum())
    assert {k: v.item() for k, v in clean_output.metrics.sums.items()} == {
        k: v.item() for k, v in dirty_output.metrics.sums.items()
    }
    assert clean_output.maxima == dirty_output.maxima
    assert torch.equal(clean_output.log_ratios, dirty_output.log_ratios)


@given(loss_inputs(), all_settings | sequence_settings, st.integers(1, 5), st.integers(0, 1000))
def test_splits_and_order_change_nothing(inputs, settings, chunk, seed):
    whole, gradient = evaluate(inputs, settings)
    order = torch.tensor(permutation(len(inputs.advantages), seed))
    parts = [evaluate(rows(inputs, index), settings) for index in order.split(chunk)]
    outputs = [output for output, _ in parts]
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(sum(o.loss_sum for o in outputs), whole.loss_sum, **close)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient[order], **close)
    assert sum(int(o.denominator) for o in outputs) == int(whole.denominator)
    summed = MetricSums.total(o.metrics for o in outputs)
    maxima = {name: max(float(o.maxima[name]) for o in outputs) for name in whole.maxima}
    got = finalize_metrics(summed, maxima)
    want = finalize_metrics(whole.metrics, whole.maxima)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)
    joined = ratio_p05(torch.cat([o.log_ratios for o in outputs]))
    assert joined == ratio_p05(whole.log_ratios) or int(whole.denominator) == 0


@given(loss_inputs(), all_settings)
def test_gradient_matches_finite_differences(inputs, settings):
    """`gradcheck`, with the weights held at the ratios of this point as stopgrad says.

    Under REINFORCE and bypass the ratio hangs on the target itself: there it is held fixed by
    hand, and what is left is linear in the target (REINFORCE) or PPO's own function of it.
    """
    mask = inputs.response_mask
    for bound in (1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high):
        for anchor in (inputs.old_logprobs, inputs.behavior_logprobs):
            # Finite differences need a neighbourhood without a kink.
            difference = (inputs.target_logprobs - anchor)[mask]
            assume(bool(((difference.exp() - bound).abs() > 1e-4).all()))
            assume(bool(((difference.abs() - settings.log_ratio_clamp).abs() > 1e-4).all()))
    target = inputs.target_logprobs.clone().requires_grad_()
    if settings.objective == "ppo_clip":

        def objective(values):
            return policy_loss(replace(inputs, target_logprobs=values), settings).loss_sum

        assert torch.autograd.gradcheck(objective, (target,))
        return
    _, gradient = evaluate(inputs, settings)
    log_w = (inputs.target_logprobs - inputs.behavior_logprobs).clamp(
        -settings.log_ratio_clamp, settings.log_ratio_clamp
    )
    weight = {
        "practical": torch.ones_like(log_w),
        "base": log_w.exp(),
        "retrace": settings.correction_settings.retrace_lambda * log_w.exp().clamp(max=1.0),
    }[settings.correction]
    want = torch.where(mask, -weight * inputs.advantages[:, None], 0.0)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12)


@given(loss_inputs(), all_settings)
def test_on_policy_every_setting_is_the_plain_policy_gradient(inputs, settings):
    """Target, behavior and old equal: ratios are exactly 1, all gradients are -A (times lambda)."""
    same = inputs.target_logprobs
    output, gradient = evaluate(
        replace(inputs, behavior_logprobs=same.clone(), old_logprobs=same.clone()), settings
    )
    scale = settings.correction_settings.retrace_lambda if settings.correction == "retrace" else 1.0
    want = torch.where(inputs.response_mask, -scale * inputs.advantages[:, None], 0.0)
    torch.testing.assert_close(gradient, want, rtol=1e-15, atol=1e-15)
    assert bool((output.log_ratios == 0).all())
    metrics = finalize_metrics(output.metrics, output.maxima)
    if int(output.denominator):
        assert metrics["rollout_corr/rollout_is_mean"] == 1.0
        assert metrics["nested/ess"] == 1.0
        assert metrics["rollout_corr/kl"] == 0.0
        assert metrics.get("actor/pg_clipfrac", 0.0) == 0.0


@given(loss_inputs(), st.sampled_from(["base", "retrace", "practical"]))
def test_diagnostics_keep_their_bounds(inputs, correction):
    output, _ = evaluate(inputs, ObjectiveSettings(correction=correction))
    assume(int(output.denominator) > 0)
    metrics = finalize_metrics(output.metrics, output.maxima)
    assert metrics["rollout_corr/k3_kl"] >= 0
    assert 0 < metrics["nested/ess"] <= 1 + 1e-12
    assert 0 < ratio_p05(output.log_ratios) <= 1
    assert metrics["rollout_corr/rollout_is_max"] >= metrics["rollout_corr/rollout_is_mean"] - 1e-12
    assert all(math.isfinite(value) for value in metrics.values())
