"""Which prompts of the stream a step takes: all in turn, or those that are worth their rollouts.

A selector is a pure function of the stream's position and of what it was told: every process, told
the same scores, chooses the same prompts, and a resumed run chooses as the killed one would have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from nested_reft_mcore.algorithm.counter_random import Stream, bits
from nested_reft_mcore.config.selection import SelectionConfig
from nested_reft_mcore.data.stream import PromptStream

_STATE = "selection"
_AWAKE, _FOR_EVER = 0, -1


class PromptSelector:
    """`uniform`: every prompt in turn."""

    learns = False
    """Whether it has to hear of scores."""

    def __init__(self, stream: PromptStream) -> None:
        self._stream = stream

    def next(self) -> list[int]:
        """Indices of the next global batch, `prompts_per_step` of them."""
        return self._stream.next()

    def observe(self, indices: Sequence[int], scores: Sequence[float], group_size: int) -> None:
        """Learn each prompt's mean score over its group; scores are cut to [0, 1]."""

    def metrics(self) -> dict[str, float]:
        """Figures of what was chosen since the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON values that a resumed run goes on from: the stream's, and what was learnt."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; what another policy has learnt is left out.

        Raises:
            UserError: it is of another data set, mixture or seed.
        """
        self._stream.load_state_dict(state)


class FilterSelector(PromptSelector):
    """`filter`: prompts that were solved, or hopeless, rest while others take their place."""

    learns = True

    def __init__(self, stream: PromptStream, config: SelectionConfig) -> None:
        super().__init__(stream)
        self._config = config
        self._streaks: dict[int, int] = {}
        """Groups in a row that were solved (above 0) or hopeless (below)."""
        self._rests: dict[int, int] = {}
        """How many times a resting prompt is still passed over."""
        self._num_passed = 0

    def next(self) -> list[int]:
        """The next prompts that are awake; where they are too few, the first resting ones too."""
        wanted = self._stream.prompts_per_step
        chosen: list[int] = []
        passed: list[int] = []
        # In so many places every prompt of an epoch comes by.
        for _ in range(self._stream.num_prompts + wanted):
            (index,) = self._stream.take(1)
            if self._is_passed_over(index):
                passed.append(index)
            else:
                chosen.append(index)
                if len(chosen) == wanted:
                    break
        self._num_passed += len(passed)
        return chosen + passed[: wanted - len(chosen)]

    def _is_passed_over(self, index: int) -> bool:
        left = self._rests.get(index, _AWAKE)
        if left == _AWAKE:
            return False
        if left != _FOR_EVER:
            self._rests[index] = left - 1
            if left == 1:
                del self._rests[index]
        return True

    def observe(self, indices: Sequence[int], scores: Sequence[float], group_size: int) -> None:
        """Count groups in a row that teach nothing, and send a prompt to rest after `patience`."""
        for index, score in zip(indices, scores, strict=True):
            streak = self._streaks.get(index, 0)
            if score >= self._config.solved_at:
                streak = max(streak, 0) + 1
            elif score <= self._config.hopeless_at:
                streak = min(streak, 0) - 1
            else:
                streak = 0
            if abs(streak) >= self._config.patience:
                self._rests[index] = self._config.rest or _FOR_EVER
                # One more such group after the rest sends it back.
                streak = (abs(streak) - 1) * (1 if streak > 0 else -1)
            self._streaks[index] = streak

    def metrics(self) -> dict[str, float]:
        """Prompts that rest now, and that were passed over since the last call."""
        passed, self._num_passed = self._num_passed, 0
        return {
            "selection/num_resting": float(len(self._rests)),
            "selection/num_passed_over": float(passed),
        }

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, streaks and rests."""
        streaks = {str(index): streak for index, streak in self._streaks.items() if streak}
        rests = {str(index): left for index, left in self._rests.items()}
        learnt = {"policy": "filter", "streaks": streaks, "rests": rests}
        return super().state_dict() | {_STATE: learnt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().load_state_dict(state)
        learnt = _learnt(state, "filter")
        self._streaks = _by_index(learnt.get("streaks", {}))
        self._rests = _by_index(learnt.get("rests", {}))


class PosteriorSelector(PromptSelector):
    """`mopps`: of several candidates those whose success rate is believed to be near the target.

    Model predictive prompt selection (arXiv 2507.04632): each prompt has a Beta posterior of its
    success rate. Seen again, with s successes of k, `alpha = decay * alpha + (1 - decay) * prior +
    s`, and likewise beta with k - s: what is long ago counts less, for the policy moves. A step
    draws a rate from the posterior of each candidate, and takes those nearest to the target: no
    rollout is spent on finding out. With the target at 1/2 the prompts get harder as the policy
    gets better.
    """

    learns = True

    def __init__(self, stream: PromptStream, config: SelectionConfig) -> None:
        super().__init__(stream)
        self._config = config
        self._prior = (config.prior_success, config.prior_failure)
        self._posteriors: dict[int, tuple[float, float]] = {}
        self._predicted: list[float] = []
        self._errors: list[float] = []

    def next(self) -> list[int]:
        """Of the stream's next candidates the best ones, in the stream's order."""
        wanted = self._stream.prompts_per_step
        rng = random.Random(bits(Stream.SELECTION, self._stream.seed, self._stream.position))
        # A window longer than an epoch holds prompts twice.
        candidates = list(dict.fromkeys(self._stream.take(wanted * self._config.candidates)))
        distances = [self._distance(index, rng) for index in candidates]
        ranked = sorted(range(len(candidates)), key=lambda place: (distances[place], place))
        chosen = [candidates[place] for place in sorted(ranked[:wanted])]
        while len(chosen) < wanted:
            chosen += chosen[: wanted - len(chosen)]
        self._predicted += [self.success_rate(index) for index in chosen]
        return chosen

    def success_rate(self, index: int) -> float:
        """What is believed of a prompt: the mean of its posterior."""
        alpha, beta = self._posteriors.get(index, self._prior)
        return alpha / (alpha + beta)

    def _distance(self, index: int, rng: random.Random) -> float:
        """How far from the target a prompt is taken to be."""
        alpha, beta = self._posteriors.get(index, self._prior)
        if self._config.sampler == "thompson":
            return abs(rng.betavariate(alpha, beta) - self._config.target)
        total = alpha + beta
        deviation = (alpha * beta / (total * total * (total + 1))) ** 0.5
        distance = abs(alpha / total - self._config.target)
        return distance - self._config.ucb_bonus * deviation

    def observe(self, indices: Sequence[int], scores: Sequence[float], group_size: int) -> None:
        """Update the posteriors of prompts that were completed `group_size` times each."""
        decay = self._config.decay
        for index, score in zip(indices, scores, strict=True):
            success = min(max(score, 0.0), 1.0)
            if index in self._posteriors:
                self._errors.append(abs(self.success_rate(index) - success))
            alpha, beta = self._posteriors.get(index, self._prior)
            self._posteriors[index] = (
                decay * alpha + (1 - decay) * self._prior[0] + group_size * success,
                decay * beta + (1 - decay) * self._prior[1] + group_size * (1 - success),
            )

    def metrics(self) -> dict[str, float]:
        """What was predicted since the last call, and how far off it was on prompts seen before."""
        found = {"selection/known_share": len(self._posteriors) / self._stream.num_prompts}
        if self._predicted:
            found["selection/predicted_success"] = sum(self._predicted) / len(self._predicted)
        if self._errors:
            found["selection/prediction_error"] = sum(self._errors) / len(self._errors)
        self._predicted, self._errors = [], []
        return found

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, and the posteriors of prompts that were seen."""
        posteriors = {str(index): list(pair) for index, pair in self._posteriors.items()}
        learnt = {"policy": "mopps", "posteriors": posteriors}
        return super().state_dict() | {_STATE: learnt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().load_state_dict(state)
        pairs = _by_index(_learnt(state, "mopps").get("posteriors", {}))
        self._posteriors = {index: (alpha, beta) for index, (alpha, beta) in pairs.items()}


def build_selector(config: SelectionConfig, stream: PromptStream) -> PromptSelector:
    """The selector that the configuration names."""
    if config.policy == "filter":
        return FilterSelector(stream, config)
    if config.policy == "mopps":
        return PosteriorSelector(stream, config)
    return PromptSelector(stream)


def _learnt(state: dict[str, Any], policy: str) -> dict[str, Any]:
    learnt = state.get(_STATE, {})
    return learnt if learnt.get("policy") == policy else {}


def _by_index(saved: dict[str, Any]) -> dict[int, Any]:
    """JSON has texts for keys."""
    return {int(index): value for index, value in saved.items()}
