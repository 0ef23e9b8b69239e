"""Expected gradients by enumerating every completion of a tiny vocabulary.

The policy is a table of logits, one row for each prefix. A batch holds every completion once, its
advantage multiplied by the probability with which the behavior policy draws it, so `loss_sum` is
the exact expectation over behavior samples.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss

VOCABULARY, STOP = 3, 0


def completions(length: int) -> list[tuple[int, ...]]:
    """Every completion: it ends at the stop token or at `length`."""
    return sorted(
        {
            tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens
            for tokens in itertools.product(range(VOCABULARY), repeat=length)
        }
    )


class TabularPolicy:
    """Log-probabilities of every completion, differentiable in one table of logits."""

    def __init__(self, length: int, seed: int, scale: float = 1.0) -> None:
        self.length = length
        self.completions = completions(length)
        self.prefixes = {(): 0}
        for tokens in self.completions:
            for t in range(1, len(tokens)):
                self.prefixes.setdefault(tokens[:t], len(self.prefixes))
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.prefixes), VOCABULARY)
        logits = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
        self.logits = logits.requires_grad_()

    def logprobs(self) -> Tensor:
        """`[completions, length]`, NaN behind the end of a completion."""
        table = torch.log_softmax(self.logits, dim=-1)
        rows = []
        for tokens in self.completions:
            row = [table[self.prefixes[tokens[:t]], token] for t, token in enumerate(tokens)]
            padding = [table.new_tensor(float("nan"))] * (self.length - len(tokens))
            rows.append(torch.stack(row + padding))
        return torch.stack(rows)

    @property
    def mask(self) -> Tensor:
        lengths = torch.tensor([len(tokens) for tokens in self.completions])
        return torch.arange(self.length)[None] < lengths[:, None]

    def probabilities(self) -> Tensor:
        """`[completions]`, adding up to 1."""
        return torch.where(self.mask, self.logprobs(), 0.0).sum(dim=1).exp()

    def rewards(self) -> Tensor:
        """An arbitrary reward of the whole completion."""
        return torch.tensor(
            [sum((t + 1.5) * token for t, token in enumerate(y)) % 2.2 for y in self.completions],
            dtype=torch.float64,
        )


def exact_gradient(policy: TabularPolicy) -> Tensor:
    """Gradient of the expected reward."""
    value = (policy.probabilities() * policy.rewards()).sum()
    return torch.autograd.grad(value, policy.logits)[0]


def expected_gradient(
    target: TabularPolicy,
    behavior: TabularPolicy,
    settings: ObjectiveSettings,
    advantages: Callable[[Tensor], Tensor] = lambda rewards: rewards,
) -> Tensor:
    """Minus the gradient of the expected loss over behavior samples."""
    drawn = behavior.probabilities().detach()
    inputs = LossInputs(
        target_logprobs=target.logprobs(),
        behavior_logprobs=behavior.logprobs().detach(),
        advantages=drawn * advantages(target.rewards()),
        response_mask=target.mask,
        old_logprobs=target.logprobs().detach(),
    )
    (gradient,) = torch.autograd.grad(policy_loss(inputs, settings).loss_sum, target.logits)
    return -gradient


ON_POLICY_SETTINGS = [
    ObjectiveSettings(correction="practical"),
    ObjectiveSettings(correction="base"),
    ObjectiveSettings(correction="retrace"),
    ObjectiveSettings(objective="ppo_clip"),
    ObjectiveSettings(objective="ppo_clip", bypass_mode=True),
]


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("settings", ON_POLICY_SETTINGS)
def test_on_policy_expectation_is_the_policy_gradient(length, settings):
    policy = TabularPolicy(length, seed=length)
    got = expected_gradient(policy, policy, settings)
    torch.testing.assert_close(got, exact_gradient(policy), rtol=1e-12, atol=1e-14)


def test_a_baseline_does_not_change_the_expectation():
    policy = TabularPolicy(3, seed=4)
    got = expected_gradient(policy, policy, ObjectiveSettings(), lambda r: r - 0.7)
    torch.testing.assert_close(got, exact_gradient(policy), rtol=1e-12, atol=1e-14)


def test_base_is_unbiased_for_a_single_token():
    target, behavior = TabularPolicy(1, seed=1), TabularPolicy(1, seed=2)
    got = expected_gradient(target, behavior, ObjectiveSettings(correction="base"))
    torch.testing.assert_close(got, exact_gradient(target), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("correction", ["practical", "base", "retrace"])
def test_no_variant_is_unbiased_for_several_tokens(correction):
    target, behavior = TabularPolicy(3, seed=1), TabularPolicy(3, seed=2)
    got = expected_gradient(target, behavior, ObjectiveSettings(correction=correction))
    exact = exact_gradient(target)
    assert (got - exact).norm() > 0.05 * exact.norm()


def test_the_trajectory_product_would_be_unbiased():
    """What the documentation says of the correction that is not among the three."""
    target, behavior = TabularPolicy(3, seed=1), TabularPolicy(3, seed=2)
    product = (target.probabilities() / behavior.probabilities()).detach()
    got = expected_gradient(target, behavior, ObjectiveSettings(), lambda r: r * product)
    torch.testing.assert_close(got, exact_gradient(target), rtol=1e-12, atol=1e-14)
