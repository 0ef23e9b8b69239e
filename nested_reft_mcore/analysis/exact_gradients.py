"""Mean and spread of a policy-gradient estimator, by summing over every completion.

Each estimator goes through `algorithm.objectives.policy_loss`, which is what training runs. Its
gradient by the log-probs of the sampled tokens is all that is taken from there: a gradient by the
parameters is a combination of score functions, so means are vectors over the entries of the
policy's table and squared lengths follow from the scores' inner products (the Gram matrix).

Gradients here point where the estimator would move the policy: they are minus those of the loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.analysis.sequence_space import SequenceSpace

_EVENTS_AT_ONCE = 8192
"""Bounds the memory of second moments: this many small Gram matrices."""


@dataclass(frozen=True)
class Sampling:
    """Who draws completions, and what the trainer knows about it; tables are
    `[prefixes, vocabulary]` log-probs, float64, without gradient."""

    space: SequenceSpace
    target: Tensor
    """The policy that is trained."""
    drawn_from: Tensor
    """What completions are really drawn from."""
    recorded: Tensor | None = None
    """What the trainer takes for it, if that is another: the mistake of a one-sided truncation."""
    left_out: Tensor | None = None
    """`[sequences]` bool: completions whose response mask is cleared, as `mask_truncated` does."""

    @property
    def probabilities(self) -> Tensor:
        """`[sequences]`: how often each completion is drawn."""
        return self.space.probabilities(self.drawn_from)

    def on_policy(self) -> Sampling:
        """The same target, drawn from itself."""
        return Sampling(self.space, self.target, self.target)


@dataclass(frozen=True)
class Moments:
    """Exact first and second moment of a random gradient."""

    mean: Tensor
    """`[entries]`: the mean gradient, as a combination of score functions."""
    second: float
    """Mean of the squared length of the gradient."""

    def variance(self, gram: Tensor) -> float:
        """Trace of the gradient's covariance."""
        return self.second - dot(self.mean, self.mean, gram)

    def squared_error(self, reference: Tensor, gram: Tensor) -> float:
        """Mean squared distance from `reference`: squared bias plus variance."""
        return self.second - 2 * dot(self.mean, reference, gram) + dot(reference, reference, gram)


def dot(left: Tensor, right: Tensor, gram: Tensor) -> float:
    """Inner product of two gradients given as combinations `[entries]` of score functions."""
    return float(left @ gram @ right)


def policy_gradient(space: SequenceSpace, target: Tensor, values: Tensor) -> Tensor:
    """`[entries]`: the gradient of the mean of `values` `[sequences]` over the target's own
    completions, sum_y target(y) values(y) sum_t score(y_t)."""
    weights = (space.probabilities(target) * values)[:, None].expand(space.mask.shape)
    return scattered(space, torch.where(space.mask, weights, 0.0), space.entries)


def token_gradients(
    sampling: Sampling, settings: ObjectiveSettings, advantages: Tensor, rows: Tensor | None = None
) -> Tensor:
    """What every sampled token's score function is multiplied by, for a batch of completions.

    The policy is at its first update: the old policy is the target.

    Args:
        sampling: gives the log-probs.
        settings: objective, correction, rejection and aggregation.
        advantages: `[rows]`.
        rows: `[rows]` which completions; left out, each once.

    Returns:
        `[rows, max_length]`; not divided by the batch's denominator.
    """
    inputs = _loss_inputs(sampling, advantages, rows)
    (gradient,) = torch.autograd.grad(
        policy_loss(inputs, settings).loss_sum, inputs.target_logprobs
    )
    return -gradient


def denominators(sampling: Sampling, settings: ObjectiveSettings) -> Tensor:
    """`[sequences]` int64: what each completion adds to its batch's denominator."""
    space = sampling.space
    ones = torch.ones(space.num_sequences, dtype=torch.float64)
    # None adds more than this, and none less than 0. Where all rows of a call together add as much,
    # or nothing, each does, and one call has told it.
    most = (
        space.lengths if settings.loss_agg_mode == "token-mean" else torch.ones_like(space.lengths)
    )

    def shares(rows: Tensor) -> Tensor:
        inputs = _loss_inputs(sampling, ones[rows], rows)
        total = policy_loss(inputs, settings).denominator
        if int(total) == int(most[rows].sum()):
            return most[rows]
        if int(total) == 0 or len(rows) == 1:
            return total.expand(len(rows))
        return torch.cat([shares(half) for half in rows.tensor_split(2)])

    return shares(torch.arange(space.num_sequences))


def batch_moments(
    sampling: Sampling,
    settings: ObjectiveSettings,
    advantages: Tensor,
    batch_size: int,
    gram: Tensor,
) -> Moments:
    """`moments_by_size` for one size."""
    return moments_by_size(sampling, settings, advantages, [batch_size], gram)[batch_size]


def moments_by_size(
    sampling: Sampling,
    settings: ObjectiveSettings,
    advantages: Tensor,
    batch_sizes: Iterable[int],
    gram: Tensor,
) -> dict[int, Moments]:
    """Moments of the gradient of batches of independent completions, by their size.

    The batch's gradient is sum_i g_i / sum_i d_i with each completion's share d_i of the
    denominator. Since d_i takes few values, the law of the sum of any number of them is a
    convolution power, and both moments are exact for every batch size:
    the mean is B sum_i p_i g_i E[1 / (d_i + D)] with D the sum of B - 1 other shares, and the
    second moment has the terms of one completion and of two in the same way. A batch whose
    denominator is 0 has gradient 0.

    Args:
        sampling: who draws.
        settings: the estimator.
        advantages: `[sequences]`, of each completion by itself.
        batch_sizes: completions in a batch.
        gram: `[entries, entries]` inner products of the score functions.
    """
    space, drawn = sampling.space, sampling.probabilities
    gradients = torch.where(
        (drawn > 0)[:, None], token_gradients(sampling, settings, advantages), 0.0
    )
    shares = denominators(sampling, settings)
    squares = squared_lengths(gradients, space.entries, gram)
    events = _Events(space, drawn, gradients, shares, squares, gram)
    return {size: _of_batch(events, size) for size in batch_sizes}


@dataclass(frozen=True)
class _Events:
    """What there is to say about every completion."""

    space: SequenceSpace
    drawn: Tensor
    """`[sequences]`"""
    gradients: Tensor
    """`[sequences, max_length]`"""
    shares: Tensor
    """`[sequences]` of the denominator."""
    squares: Tensor
    """`[sequences]`: squared lengths of the gradients."""
    gram: Tensor


def _of_batch(events: _Events, batch_size: int) -> Moments:
    space, drawn, shares = events.space, events.drawn, events.shares
    gradients, gram = events.gradients, events.gram
    law = torch.bincount(shares, weights=drawn, minlength=2).numpy()
    others = _sum_of_shares(law, batch_size - 1)
    inverse, inverse_square = _mean_inverse(others, len(law), 1), _mean_inverse(others, len(law), 2)
    weights = drawn * inverse[shares] * batch_size
    mean = scattered(space, gradients * weights[:, None], space.entries)
    second = float((drawn * inverse_square[shares] * events.squares).sum()) * batch_size
    if batch_size > 1:
        by_share = torch.stack(
            [
                scattered(space, gradients * (drawn * (shares == d))[:, None], space.entries)
                for d in range(len(law))
            ]
        )
        two = _mean_inverse(_sum_of_shares(law, batch_size - 2), 2 * len(law), 2)
        total = torch.arange(len(law))[:, None] + torch.arange(len(law))[None]
        products = by_share @ gram @ by_share.T
        second += batch_size * (batch_size - 1) * float((products * two[total]).sum())
    return Moments(mean, second)


def group_moments(
    sampling: Sampling,
    settings: ObjectiveSettings,
    advantages_of: Callable[[Tensor], Tensor],
    rewards: Tensor,
    group_size: int,
    gram: Tensor,
) -> Moments:
    """Moments of the gradient of one group of completions of the same prompt, a batch by itself.

    Every group is enumerated, in every order: keep the space small.

    Args:
        sampling: who draws.
        settings: the estimator.
        advantages_of: from `[groups * group_size]` rewards to as many advantages, by runs of
            `group_size`.
        rewards: `[sequences]`.
        group_size: completions in the group.
        gram: `[entries, entries]` inner products of the score functions.
    """
    space = sampling.space
    groups = torch.tensor(list(itertools.product(range(space.num_sequences), repeat=group_size)))
    rows = groups.flatten()
    gradients = token_gradients(sampling, settings, advantages_of(rewards[rows]), rows)
    total = denominators(sampling, settings)[groups].sum(dim=1)
    drawn = sampling.probabilities[groups].prod(dim=1)
    gradients = gradients.reshape(len(groups), -1) / total.clamp(min=1)[:, None]
    gradients = torch.where((drawn > 0)[:, None], gradients, 0.0)
    entries = space.entries[rows].reshape(len(groups), -1)
    mean = scattered(space, gradients * drawn[:, None], entries)
    return Moments(mean, float((drawn * squared_lengths(gradients, entries, gram)).sum()))


def _loss_inputs(sampling: Sampling, advantages: Tensor, rows: Tensor | None = None) -> LossInputs:
    space = sampling.space
    index = torch.arange(space.num_sequences) if rows is None else rows
    target = space.logprobs(sampling.target)[index]
    recorded = sampling.drawn_from if sampling.recorded is None else sampling.recorded
    mask = space.mask if sampling.left_out is None else space.mask & ~sampling.left_out[:, None]
    return LossInputs(
        target_logprobs=target.clone().requires_grad_(),
        behavior_logprobs=space.logprobs(recorded)[index],
        advantages=advantages,
        response_mask=mask[index],
        old_logprobs=target,
    )


def scattered(space: SequenceSpace, gradients: Tensor, entries: Tensor) -> Tensor:
    """`[entries]`: token gradients of all events added up by the entry of their token."""
    size = len(space.prefixes) * space.vocabulary
    return gradients.new_zeros(size).index_add_(0, entries.flatten(), gradients.flatten())


def squared_lengths(gradients: Tensor, entries: Tensor, gram: Tensor) -> Tensor:
    """`[events]`: squared length of each event's gradient, from `[events, tokens]`."""
    parts = [
        torch.einsum("et,etu,eu->e", g, gram[e[:, :, None], e[:, None, :]], g)
        for g, e in zip(
            gradients.split(_EVENTS_AT_ONCE), entries.split(_EVENTS_AT_ONCE), strict=True
        )
    ]
    return torch.cat(parts)


def _sum_of_shares(law: np.ndarray, count: int) -> np.ndarray:
    """Probabilities of the sum of `count` independent shares whose own law is given."""
    total, power = np.ones(1), law
    while count:
        if count & 1:
            total = np.convolve(total, power)
        power, count = np.convolve(power, power) if count > 1 else power, count >> 1
    return total


def _mean_inverse(others: np.ndarray, num_shares: int, exponent: int) -> Tensor:
    """`[num_shares]`: mean of (d + D)^-exponent for each own share d, 0 where d + D is 0."""
    own = np.arange(num_shares)[:, None] + np.arange(len(others))[None]
    inverse = np.where(own > 0, 1.0 / np.maximum(own, 1) ** exponent, 0.0)
    return torch.from_numpy(inverse @ others)
