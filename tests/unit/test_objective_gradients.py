"""`gradcheck` of every objective and regularizer in float64, and the edges of a batch.

Stopped gradients are held by hand: where a factor may not move with the target, the log-probs that
it is made of move along, so that the factor stays what it is.
"""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from nested_reft_mcore.algorithm.advantages import AdvantageMethod, group_relative_advantages
from nested_reft_mcore.algorithm.diagnostics import finalize_metrics
from nested_reft_mcore.algorithm.importance import (
    CORRECTIONS,
    CorrectionSettings,
    log_importance_ratio,
)
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.algorithm.rejection import REJECTIONS, RejectionRule, accepted

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
OBJECTIVES = ("reinforce", "ppo_clip", "cispo", "gspo")
BOUNDS = CorrectionSettings(retrace_lambda=0.9, lower=0.2, upper=1.5)


def batch(seed: int = 3, rows: int = 4, seq: int = 5, density: float = 0.8) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    target = -normal(rows, seq).abs() - 0.1
    old = target + 0.2 * normal(rows, seq)
    return LossInputs(
        target_logprobs=target,
        behavior_logprobs=old + 0.3 * normal(rows, seq),
        old_logprobs=old,
        ref_logprobs=target + 0.4 * normal(rows, seq),
        advantages=normal(rows),
        response_mask=torch.rand(rows, seq, generator=generator) < density,
        entropy=normal(rows, seq).abs(),
    )


def settings_of(objective: str = "reinforce", **changes) -> ObjectiveSettings:
    defaults = {"correction_settings": BOUNDS, "max_response_length": 5}
    return ObjectiveSettings(**{"objective": objective, **defaults, **changes})


def check(inputs: LossInputs, settings: ObjectiveSettings, *, hold_ratios: bool) -> None:
    """`gradcheck` by target log-probs and entropy."""
    values = inputs.target_logprobs.clone().requires_grad_()
    entropy = inputs.entropy.clone().requires_grad_()

    def loss(target, entropies):
        moved = replace(inputs, target_logprobs=target, entropy=entropies)
        if hold_ratios:
            shift = (target - inputs.target_logprobs).detach()
            names = ("behavior_logprobs", "old_logprobs")
            moved = replace(moved, **{name: getattr(inputs, name) + shift for name in names})
        return policy_loss(moved, settings).loss_sum

    # Fast: a random direction through all entries; the golden values say what each entry is.
    assert torch.autograd.gradcheck(loss, (values, entropy), fast_mode=True)
    gradient, _ = torch.autograd.grad(loss(values, entropy), (values, entropy), allow_unused=True)
    assert bool((gradient != 0).any()), "a loss that hangs on nothing would pass"


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_gradcheck_with_weights_of_every_correction(correction):
    """REINFORCE and CISPO: linear at fixed weights. PPO: its weight is of old / behavior."""
    for objective in ("reinforce", "cispo"):
        check(batch(), settings_of(objective, correction=correction), hold_ratios=True)
    check(batch(), settings_of("ppo_clip", correction=correction), hold_ratios=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("objective", ["ppo_clip", "gspo"])
def test_gradcheck_of_clipped_objectives(objective, bypass, mode):
    """GSPO's token form has the gradient of the sequence form, which is what differences see."""
    for dual in (None, 1.05):
        for settings in (
            settings_of(objective, bypass_mode=bypass, loss_agg_mode=mode, clip_ratio_c=dual),
            settings_of(
                objective,
                bypass_mode=bypass,
                loss_agg_mode=mode,
                clip_ratio_c=dual,
                clip_ratio_low=0.05,
                clip_ratio_high=0.4,
            ),
        ):
            check(batch(), settings, hold_ratios=False)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_but_the_policy_and_its_entropy_gets_a_gradient(objective):
    """Log-probs that were found without `no_grad` would pull the ratio the other way."""
    given = batch()
    names = ("target_logprobs", "behavior_logprobs", "old_logprobs", "ref_logprobs")
    names += ("advantages", "entropy")
    leaves = {name: getattr(given, name).clone().requires_grad_() for name in names}
    regularizers = {"kl_loss_coef": 0.3, "kl_corrected": True, "entropy_coeff": 0.1}
    # The ratio over the old policy beside a weight, and the ratio over the behavior policy.
    variants = [settings_of(objective, correction="retrace", **regularizers)]
    if objective != "reinforce":
        variants.append(settings_of(objective, bypass_mode=True, **regularizers))
    for settings in variants:
        loss = policy_loss(replace(given, **leaves), settings).loss_sum
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        moved = {n for n, g in zip(names, gradients, strict=True) if g is not None and g.any()}
        assert moved == {"target_logprobs", "entropy"}


@pytest.mark.parametrize("objective", ["ppo_clip", "cispo"])
def test_a_ratio_of_the_policy_to_itself_has_the_gradient_of_reinforce(objective):
    """One update a step needs no pass for old log-probs: they may be the target's own tensor."""
    given = batch()
    target = given.target_logprobs.clone().requires_grad_()
    itself = replace(given, target_logprobs=target, old_logprobs=target)
    found = torch.autograd.grad(policy_loss(itself, settings_of(objective)).loss_sum, target)
    plain = torch.autograd.grad(policy_loss(itself, settings_of("reinforce")).loss_sum, target)
    assert bool(plain[0].any())
    torch.testing.assert_close(found, plain)


def test_dual_clip_holds_some_tokens_of_that_batch():
    for objective in ("ppo_clip", "gspo"):
        settings = settings_of(objective, bypass_mode=True, clip_ratio_c=1.05)
        output = policy_loss(batch(), settings)
        metrics = finalize_metrics(output.metrics, output.maxima)
        assert 0 < metrics["actor/pg_clipfrac_lower"] < 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradcheck_of_kl_terms_and_entropy_bonus(kind, mode):
    for corrected in (False, True):
        settings = settings_of(
            kl_loss_coef=0.3,
            kl_loss_type=kind,
            kl_corrected=corrected,
            entropy_coeff=0.1,
            loss_agg_mode=mode,
        )
        check(batch(), settings, hold_ratios=False)


def test_gradcheck_after_rejection():
    rule = RejectionRule("token_k1", 1.3)
    for objective in OBJECTIVES:
        settings = settings_of(objective, rejections=(rule,))
        linear = objective in ("reinforce", "cispo")
        check(batch(), settings, hold_ratios=linear)


# --- edges ---

ALL_SETTINGS = [
    *(settings_of(objective, correction=name) for objective in OBJECTIVES for name in CORRECTIONS),
    *(
        settings_of(rejections=(RejectionRule(name, 1.2),), loss_agg_mode=mode)
        for name in REJECTIONS
        for mode in MODES
    ),
    *(
        settings_of(objective, bypass_mode=True, clip_ratio_c=1.5, loss_agg_mode=mode)
        for objective in OBJECTIVES[1:]
        for mode in MODES
    ),
    *(
        settings_of(
            "ppo_clip",
            kl_loss_coef=0.2,
            kl_loss_type=kind,
            kl_corrected=corrected,
            entropy_coeff=0.1,
        )
        for kind in ("k1", "k2", "k3")
        for corrected in (False, True)
    ),
]
NAMES = ("target_logprobs", "behavior_logprobs", "old_logprobs", "ref_logprobs", "entropy")


def run(inputs: LossInputs, settings: ObjectiveSettings):
    """Output and gradients by target log-probs and entropy."""
    target = inputs.target_logprobs.clone().requires_grad_()
    entropy = inputs.entropy.clone().requires_grad_()
    output = policy_loss(replace(inputs, target_logprobs=target, entropy=entropy), settings)
    gradients = torch.autograd.grad(
        output.loss_sum, (target, entropy), allow_unused=True, materialize_grads=True
    )
    return output, gradients


def plain(numbers) -> dict:
    return {name: float(value) for name, value in numbers.items()}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_masked_positions_influence_nothing_whatever_the_settings(poison):
    clean = batch()
    hidden = ~clean.response_mask
    assert bool(hidden.any())
    dirty = replace(
        clean, **{name: getattr(clean, name).masked_fill(hidden, poison) for name in NAMES}
    )
    for settings in ALL_SETTINGS:
        (want, want_gradients), (got, got_gradients) = run(clean, settings), run(dirty, settings)
        assert torch.equal(want.loss_sum, got.loss_sum)
        assert int(want.denominator) == int(got.denominator)
        assert plain(want.metrics.sums) == plain(got.metrics.sums)
        for one, other in zip(want_gradients, got_gradients, strict=True):
            assert torch.equal(one, other)
            assert bool((other[hidden] == 0).all())


def test_a_batch_without_response_tokens_is_zero_and_finite():
    empty = replace(batch(), response_mask=torch.zeros(4, 5, dtype=torch.bool))
    for settings in ALL_SETTINGS:
        output, gradients = run(empty, settings)
        assert output.loss_sum.item() == 0.0
        assert int(output.denominator) == 0
        assert all(not bool(gradient.any()) for gradient in gradients)
        assert output.log_ratios.numel() == 0
        metrics = finalize_metrics(output.metrics, output.maxima)
        assert all(value == 0.0 for value in metrics.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_is_wholly_rejected_is_zero_and_still_measured(mode):
    inputs = batch()
    rule = RejectionRule("token_k2", 1e-12)
    for objective in OBJECTIVES:
        settings = settings_of(objective, rejections=(rule,), loss_agg_mode=mode)
        output, gradients = run(inputs, settings)
        assert output.loss_sum.item() == 0.0
        assert all(not bool(gradient.any()) for gradient in gradients)
        # Dr. GRPO's constant is one even now; the others say that nothing is left.
        rows = int(inputs.response_mask.any(dim=1).sum())
        assert int(output.denominator) == (rows if mode == MODES[2] else 0)
        metrics = finalize_metrics(output.metrics, output.maxima)
        assert metrics["rollout_corr/rollout_rs_masked_fraction"] == 1.0
        assert metrics["rollout_corr/kl"] != 0
        assert 0 < metrics["nested/ess"] < 1
        assert output.log_ratios.numel() == int(inputs.response_mask.sum())


def test_for_one_token_responses_all_ratios_of_a_sequence_are_the_tokens():
    inputs = batch(seq=1, density=1.0)
    # Bounds of one correction or another are out of the way.
    open_bounds = CorrectionSettings(retrace_lambda=1.0)
    losses = {
        name: run(inputs, settings_of(correction=name, correction_settings=open_bounds))
        for name in CORRECTIONS
    }
    for name in ("trajectory", "prefix", "tis", "icepop", "geometric"):
        for got, want in zip(losses[name][1], losses["base"][1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        losses["retrace_cumulative"][1][0], losses["retrace"][1][0], rtol=1e-14, atol=0
    )
    modes = [run(inputs, settings_of(loss_agg_mode=m, max_response_length=1)) for m in MODES]
    for output, gradients in modes[1:]:
        torch.testing.assert_close(gradients[0], modes[0][1][0], rtol=1e-14, atol=0)
        assert int(output.denominator) == int(modes[0][0].denominator) == 4


@pytest.mark.parametrize("name", REJECTIONS)
def test_bounds_of_a_rejection_are_as_wide_as_its_estimator(name):
    """k2 and k3 start at 0, so that small bounds are the strict ones; k1's are ratios around 1."""
    if name.endswith("k1"):
        assert RejectionRule(name, 0.9, 0.5).lower == 0.5
        with pytest.raises(ValueError, match="between 0 < lower <= upper"):
            RejectionRule(name, 0.9)
    else:
        assert RejectionRule(name, 0.01).upper == 0.01
        with pytest.raises(ValueError, match="upper bound only"):
            RejectionRule(name, 0.01, 0.001)
    with pytest.raises(ValueError, match="bound above 0"):
        RejectionRule(name, 0.0)


@pytest.mark.parametrize(
    ("rule", "shift"),
    [
        (RejectionRule("token_k1", 2.0), math.log(2)),
        (RejectionRule("token_k1", 4.0, 0.5), math.log(2)),
        (RejectionRule("token_k1", 2.0, 1e-3), -math.log(2)),
        (RejectionRule("token_k2", 0.5), 1.0),
        (RejectionRule("seq_max_k2", 0.5), -1.0),
        (RejectionRule("seq_sum_k2", 1.0), 1.0),
    ],
)
def test_what_lies_on_a_bound_of_a_rejection_is_kept(rule, shift):
    def kept(log_ratio: float) -> list[bool]:
        values = torch.tensor([[log_ratio, log_ratio]], dtype=torch.float64)
        mask = torch.ones(1, 2, dtype=torch.bool)
        ratio = log_importance_ratio(values, torch.zeros_like(values), mask, 20.0)
        return accepted(ratio, (rule,))[0].tolist()

    assert kept(shift) == [True, True]
    assert kept(shift * (1 + 1e-12)) == [False, False]


METHODS = get_args(AdvantageMethod)


@pytest.mark.parametrize("method", METHODS)
def test_advantages_of_a_group_of_one_and_of_equal_rewards_are_zero(method):
    alone = group_relative_advantages(torch.tensor([3.0, -1.0, 0.7]), method, group_size=1)
    assert alone.tolist() == [0.0, 0.0, 0.0]
    for reward in (0.1, -7.3, 1e6):
        equal = group_relative_advantages(torch.full((8,), reward), method, group_size=4)
        assert equal.tolist() == [0.0] * 8


@pytest.mark.parametrize("method", METHODS)
def test_advantages_ignore_a_shift_and_follow_a_permutation(method):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(12, dtype=torch.float64, generator=generator)
    want = group_relative_advantages(rewards, method, group_size=4)
    shift = torch.tensor([5.0, -2.0, 0.25], dtype=torch.float64).repeat_interleave(4)
    got = group_relative_advantages(rewards + shift, method, group_size=4)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    order = torch.randperm(12, generator=generator)
    groups = torch.arange(12) // 4
    got = group_relative_advantages(rewards[order], method, group_ids=groups[order])
    torch.testing.assert_close(got, want[order], rtol=1e-13, atol=1e-14)
    assert float(want.reshape(3, 4).sum(dim=1).abs().max()) < 1e-12
