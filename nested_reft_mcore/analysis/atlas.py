"""The bias-variance atlas: what every estimator does to the gradient, by layers skipped.

Behavior policies are the toy policies with some of their own layers skipped. For each of them mean
and covariance of each estimator's gradient are exact; what is averaged is over policies (seeds) and
plans. Everything is relative to the squared length of the on-policy gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import AdvantageMethod, group_relative_advantages
from nested_reft_mcore.algorithm.aggregation import LossAggMode
from nested_reft_mcore.algorithm.counter_random import Stream, shuffled
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.objectives import ObjectiveSettings
from nested_reft_mcore.analysis.estimators import Estimator, estimators
from nested_reft_mcore.analysis.exact_gradients import (
    Moments,
    Sampling,
    batch_moments,
    dot,
    group_moments,
    moments_by_size,
    policy_gradient,
)
from nested_reft_mcore.analysis.group_batches import GroupBatch, group_batch_moments
from nested_reft_mcore.analysis.sequence_space import SequenceSpace
from nested_reft_mcore.analysis.toy_policy import ToyPolicy

AGGREGATIONS: tuple[LossAggMode, ...] = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
ADVANTAGES: tuple[AdvantageMethod, ...] = ("rloo", "dr_grpo", "grpo")
GROUP_SIZES = (2, 3)
GROUP_SPACE = SequenceSpace(vocabulary=3, max_length=3)
"""Small, for groups of three of its completions are enumerated."""
COMPARED = ("practical", "trajectory")
"""Corrections of the tables of denominators, groups and batches of groups."""
BATCH_ADVANTAGES: tuple[AdvantageMethod, ...] = ("rloo", "grpo", "reinforce_plus_plus_baseline")
NUM_GROUPS = 3
"""Groups in the batches of the last table."""
MAX_REFILLS = 3
"""Of `filter_groups`; what `algorithm.max_refills` is where it is left out."""


@dataclass(frozen=True)
class AtlasSettings:
    """What is enumerated. ValueError where there are no such plans, or too many completions."""

    num_layers: int = 8
    skipped: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Numbers of layers to skip."""
    border_layers: int = 1
    num_plans: int = 6
    """At most so many plans for each number of layers."""
    num_seeds: int = 3
    """Toy policies."""
    space: SequenceSpace = field(default_factory=lambda: SequenceSpace(4, 5))
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)

    def __post_init__(self) -> None:
        valid = self.num_layers - 2 * self.border_layers
        for count in self.skipped:
            if not 0 <= count <= valid:
                raise ValueError(
                    f"{count} layers to skip, but of {self.num_layers} layers with "
                    f"{self.border_layers} at either end kept at most {max(valid, 0)} can be"
                )

    def plans(self, num_skipped: int, seed: int) -> list[LayerSkipPlan]:
        """Different plans of whole layers: all of them, or `num_plans` at random by the seed."""
        valid = range(self.border_layers, self.num_layers - self.border_layers)
        found = list(itertools.combinations(valid, num_skipped))
        order = shuffled(range(len(found)), Stream.PLAN, seed, num_skipped)[: self.num_plans]
        return [
            LayerSkipPlan(self.num_layers, frozenset((layer, "layer") for layer in found[i]))
            for i in order
        ]


@dataclass(frozen=True)
class Point:
    """One estimator at one number of skipped layers; lengths are relative to the on-policy
    gradient's, squares to its square."""

    table: str
    """`estimator`, `denominator`, `group` or `batch`."""
    section: str
    name: str
    num_skipped: int
    bias: float
    """Root mean square over behavior policies of |mean - on-policy gradient|."""
    bias_of_mean: float
    """The same after averaging over plans: what is left of it over many steps."""
    cosine: float
    """Between the mean and the on-policy gradient; mean over behavior policies."""
    variance: float
    """Trace of the covariance of one sample's gradient (a completion, a group, or groups)."""
    squared_error: dict[int, float]
    """By batch size: mean squared error."""
    scaled_error: dict[int, float]
    """By batch size: the least mean squared error of any multiple of the estimate, from 0 to 1.
    It judges direction and noise alone, for optimizers that take no notice of the scale."""


@dataclass(frozen=True)
class Distance:
    """How far off-policy so many skipped layers are; means over behavior policies."""

    num_skipped: int
    kl: float
    """KL(behavior || target), nats per token."""
    ess: float
    """Effective sample size of the tokens' ratios, a fraction."""
    ess_sequence: float
    """The same of whole completions' ratios."""
    total_variation: float
    """Of whole completions."""


@dataclass(frozen=True)
class Atlas:
    """All points, in the order of the tables."""

    settings: AtlasSettings
    distances: list[Distance]
    points: list[Point]

    def select(self, table: str) -> list[Point]:
        """The points of a table."""
        return [point for point in self.points if point.table == table]


def make_atlas(settings: AtlasSettings) -> Atlas:
    """Enumerate everything; a minute or two with the defaults on one core."""
    seeds, space = range(settings.num_seeds), settings.space
    scenes = [_Scene.make(settings, space, space.verifiable_rewards(), seed) for seed in seeds]
    # With binary rewards every mixed group of two or three has the same deviation, and GRPO's
    # division by it would only scale: hence graded ones.
    graded = GROUP_SPACE.graded_rewards()
    small = [_Scene.make(settings, GROUP_SPACE, graded, seed) for seed in seeds]
    points = [
        point
        for num_skipped in settings.skipped
        for point in (
            *_estimator_points(scenes, num_skipped, settings.batch_sizes),
            *_denominator_points(scenes, num_skipped, settings.batch_sizes),
            *_group_points(small, num_skipped),
            *_batch_points(small, num_skipped),
        )
    ]
    return Atlas(settings, [_distance(scenes, k) for k in settings.skipped], points)


@dataclass(frozen=True)
class _Scene:
    """One toy policy, its rewards, and the behavior policies that skip its layers."""

    space: SequenceSpace
    rewards: Tensor
    gram: Tensor
    samplings: dict[int, list[Sampling]]
    """By number of layers skipped, one for each plan."""

    @classmethod
    def make(
        cls, settings: AtlasSettings, space: SequenceSpace, rewards: Tensor, seed: int
    ) -> _Scene:
        policy = ToyPolicy(space, settings.num_layers, seed)
        scores = policy.scores()
        with torch.no_grad():
            target = policy.table()
            samplings = {
                k: [Sampling(space, target, policy.table(p)) for p in settings.plans(k, seed)]
                for k in settings.skipped
            }
        return cls(space, rewards, scores @ scores.T, samplings)

    def on_policy_gradient(self, sampling: Sampling) -> Tensor:
        """Of the mean reward, over the constant that estimators divide by."""
        gradient = policy_gradient(self.space, sampling.target, self.rewards)
        return gradient / self.space.max_length

    def centred(self, sampling: Sampling) -> Tensor:
        """Rewards minus their mean under what is drawn: leave-one-out in a large group."""
        return self.rewards - (sampling.probabilities * self.rewards).sum()


_MomentsOf = Callable[[_Scene, Sampling], tuple[Moments, dict[int, Moments]]]
"""Moments of one sample and of batches."""


def _point(
    scenes: Sequence[_Scene], table: str, section: str, name: str, k: int, moments_of: _MomentsOf
) -> Point:
    biases, cosines, variances, of_means = [], [], [], []
    errors: dict[int, list[float]] = {}
    scaled: dict[int, list[float]] = {}
    for scene in scenes:
        means = []
        for sampling in scene.samplings[k]:
            reference = scene.on_policy_gradient(sampling)
            unit = dot(reference, reference, scene.gram)
            one, batches = moments_of(scene, sampling)
            means.append(one.mean)
            biases.append(_squared_distance(one.mean, reference, scene.gram) / unit)
            along = dot(one.mean, reference, scene.gram)
            length = math.sqrt(unit * dot(one.mean, one.mean, scene.gram))
            cosines.append(along / length if length > 0 else 0.0)
            variances.append(one.variance(scene.gram) / unit)
            for size, batch in batches.items():
                errors.setdefault(size, []).append(
                    batch.squared_error(reference, scene.gram) / unit
                )
                along = dot(batch.mean, reference, scene.gram)
                share = along**2 / (unit * batch.second) if batch.second > 0 else 0.0
                scaled.setdefault(size, []).append(1.0 - share)
        average = torch.stack(means).mean(dim=0)
        of_means.append(_squared_distance(average, reference, scene.gram) / unit)
    return Point(
        table=table,
        section=section,
        name=name,
        num_skipped=k,
        bias=math.sqrt(_mean(biases)),
        bias_of_mean=math.sqrt(_mean(of_means)),
        cosine=_mean(cosines),
        variance=_mean(variances),
        squared_error={size: _mean(values) for size, values in errors.items()},
        scaled_error={size: _mean(values) for size, values in scaled.items()},
    )


def _estimator_points(
    scenes: Sequence[_Scene], k: int, batch_sizes: Sequence[int]
) -> Iterator[Point]:
    for row in estimators(scenes[0].space.max_length):
        moments_of = partial(_estimator_moments, row, batch_sizes)
        yield _point(scenes, "estimator", row.section, row.name, k, moments_of)


def _estimator_moments(
    row: Estimator, batch_sizes: Sequence[int], scene: _Scene, sampling: Sampling
) -> tuple[Moments, dict[int, Moments]]:
    sampling = row.sample(sampling)
    one = batch_moments(sampling, row.settings, scene.centred(sampling), 1, scene.gram)
    # The denominator is a constant: a batch is an average of independent gradients.
    length, variance = dot(one.mean, one.mean, scene.gram), one.variance(scene.gram)
    return one, {size: Moments(one.mean, length + variance / size) for size in batch_sizes}


def _denominator_points(
    scenes: Sequence[_Scene], k: int, batch_sizes: Sequence[int]
) -> Iterator[Point]:
    for masked, mode, correction in itertools.product((False, True), AGGREGATIONS, COMPARED):
        settings = ObjectiveSettings(
            correction=correction,
            loss_agg_mode=mode,
            max_response_length=scenes[0].space.max_length,
        )
        moments_of = partial(_denominator_moments, settings, masked, batch_sizes)
        section = f"{mode}, mask_truncated" if masked else mode
        yield _point(scenes, "denominator", section, correction, k, moments_of)


def _denominator_moments(
    settings: ObjectiveSettings,
    masked: bool,
    batch_sizes: Sequence[int],
    scene: _Scene,
    sampling: Sampling,
) -> tuple[Moments, dict[int, Moments]]:
    # What is cut off still counts in the mean reward that the others are judged by.
    advantages = scene.centred(sampling)
    if masked:
        sampling = replace(sampling, left_out=scene.space.truncated)
    sizes = {1, *batch_sizes}
    found = moments_by_size(sampling, settings, advantages, sizes, scene.gram)
    return found[1], {size: found[size] for size in batch_sizes}


def _group_points(scenes: Sequence[_Scene], k: int) -> Iterator[Point]:
    for method, size, correction in itertools.product(ADVANTAGES, GROUP_SIZES, COMPARED):
        moments_of = partial(_group_moments, method, size, correction)
        yield _point(scenes, "group", f"{method}, {size} a group", correction, k, moments_of)


def _group_moments(
    method: AdvantageMethod, size: int, correction: str, scene: _Scene, sampling: Sampling
) -> tuple[Moments, dict[int, Moments]]:
    settings = _constant_denominator(correction, scene)
    advantages_of = partial(group_relative_advantages, method=method, group_size=size)
    one = group_moments(sampling, settings, advantages_of, scene.rewards, size, scene.gram)
    return one, {}


def _batch_points(scenes: Sequence[_Scene], k: int) -> Iterator[Point]:
    refills: tuple[int | None, ...] = (None, MAX_REFILLS)
    for method, size, limit, correction in itertools.product(
        BATCH_ADVANTAGES, GROUP_SIZES, refills, COMPARED
    ):
        batch = GroupBatch(method, size, NUM_GROUPS, limit)
        moments_of = partial(_batch_moments, batch, correction)
        section = f"{method}, {size} a group" + ("" if limit is None else ", filter_groups")
        yield _point(scenes, "batch", section, correction, k, moments_of)


def _batch_moments(
    batch: GroupBatch, correction: str, scene: _Scene, sampling: Sampling
) -> tuple[Moments, dict[int, Moments]]:
    settings = _constant_denominator(correction, scene)
    return group_batch_moments(sampling, settings, batch, scene.rewards, scene.gram), {}


def _constant_denominator(correction: str, scene: _Scene) -> ObjectiveSettings:
    return ObjectiveSettings(
        correction=correction,
        loss_agg_mode="seq-mean-token-sum-norm",
        max_response_length=scene.space.max_length,
    )


def _distance(scenes: Sequence[_Scene], k: int) -> Distance:
    kls, token_sizes, sequence_sizes, variations = [], [], [], []
    for scene in scenes:
        for sampling in scene.samplings[k]:
            drawn = sampling.probabilities
            log_ratio = scene.space.logprobs(sampling.target) - scene.space.logprobs(
                sampling.drawn_from
            )
            log_ratio = torch.where(scene.space.mask, log_ratio, 0.0)
            tokens = (drawn * scene.space.lengths).sum()
            ratio = torch.where(scene.space.mask, log_ratio.exp(), 0.0)
            kls.append(-float((drawn * log_ratio.sum(dim=1)).sum() / tokens))
            first, second = (drawn @ ratio).sum(), (drawn @ ratio**2).sum()
            token_sizes.append(float(first**2 / (tokens * second)))
            whole = log_ratio.sum(dim=1).exp()
            sequence_sizes.append(float(1.0 / (drawn * whole**2).sum()))
            variations.append(float((drawn * (whole - 1.0).abs()).sum()) / 2)
    return Distance(k, _mean(kls), _mean(token_sizes), _mean(sequence_sizes), _mean(variations))


def _squared_distance(left: Tensor, right: Tensor, gram: Tensor) -> float:
    return max(0.0, dot(left - right, left - right, gram))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
