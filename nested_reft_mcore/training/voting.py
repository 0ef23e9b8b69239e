"""Which completions of a prompt give the same answer, for the majority's vote."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import TracebackType

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import (
    COMPARING_REWARDS,
    RewardConfig,
    RewardFunctionConfig,
)
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.final_answer import final_answer, last_box
from nested_reft_mcore.rewards.numeric_match import final_number
from nested_reft_mcore.rewards.pool import RewardPool
from nested_reft_mcore.rollout.types import Rollout, RolloutBatch

_log = logging.getLogger(__name__)

NUMERIC_REWARDS = ("math_verify", "numeric_match")

MAX_ANSWER_CHARACTERS = 400
"""Longer ones are nobody's answer, and are cut."""

Same = Callable[[Sequence[RewardItem]], list[bool]]


class AnswerVotes:
    """Numbers equal answers alike. A context manager: it may have to start reward workers."""

    def __init__(self, config: RewardConfig, judged_by: int | None = None) -> None:
        """`judged_by` is the place in `config.weighted` of the reward that says what is right."""
        self._config = config
        self._reward = comparing_reward(config, judged_by)
        self._pool: RewardPool | None = None

    def __enter__(self) -> AnswerVotes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __call__(self, batch: RolloutBatch, rewards: Sequence[float]) -> list[int | None]:
        """For each completion the number of its answer within its group; None without one."""
        size = batch.group_size
        groups = [
            AnswerGroup(group, rewards[i * size : (i + 1) * size], self._reads_numbers)
            for i, group in enumerate(batch.groups())
        ]
        # Of two answers neither wins unless one of them is none: their equality changes nothing.
        if size > 2 and self._reward is not None:
            merge_equal(groups, self._same)
        return [number for group in groups for number in group.numbers()]

    def _same(self, items: Sequence[RewardItem]) -> list[bool]:
        assert self._reward is not None, "asked for only then"
        try:
            if self._pool is None:
                self._pool = RewardPool(
                    (self._reward,),
                    self._config.num_workers,
                    self._config.deadline_seconds,
                    int(self._config.memory_limit_gb * 1e9),
                    self._config.start_timeout_seconds,
                )
            return [result.value > 0.5 for result in self._pool.score(items)]
        except (UserError, OSError) as error:
            _log.warning("answers are compared as texts from here on: %s", error)
            self._reward = None
            return [False] * len(items)

    @property
    def _reads_numbers(self) -> bool:
        return self._reward is not None and self._reward.name in NUMERIC_REWARDS


class AnswerGroup:
    """The answers of one prompt's completions, at first as different as their texts."""

    def __init__(
        self, rollouts: Sequence[Rollout], rewards: Sequence[float], reads_numbers: bool = True
    ) -> None:
        self._prompt = rollouts[0].prompt.text
        # Under a reward of 0 and 1 right answers equal the reference, whatever they look like.
        is_binary = all(reward in (0.0, 1.0) for reward in rewards)
        self._is_right = [is_binary and reward == 1.0 for reward in rewards]
        self._texts = [answer_text(rollout.text, reads_numbers) for rollout in rollouts]
        self._kind_of_text: dict[str, str] = {}
        for text, right in zip(self._texts, self._is_right, strict=True):
            if text is not None and not right:
                self._kind_of_text.setdefault(text, text)
        self._open = list(self._kind_of_text)

    def questions(self) -> list[RewardItem]:
        """Whether the first of the answers that are left equals each of the others."""
        first, *others = self._open or [""]
        return [RewardItem(self._prompt, f"\\boxed{{{text}}}", first) for text in others]

    def settle(self, same: Sequence[bool]) -> None:
        """Take the replies to `questions`."""
        first, *others = self._open or [""]
        left = []
        for text, equal in zip(others, same, strict=True):
            if equal:
                self._kind_of_text[text] = first
            else:
                left.append(text)
        self._open = left

    def numbers(self) -> list[int | None]:
        """Equal numbers for equal answers; right ones are 0, those without an answer None.

        Also a right one does not vote where no answer can be read: a wrong one like it does not.
        """
        places = {kind: i for i, kind in enumerate(dict.fromkeys(self._kind_of_text.values()), 1)}
        return [
            None if text is None else 0 if right else places[self._kind_of_text[text]]
            for text, right in zip(self._texts, self._is_right, strict=True)
        ]


def merge_equal(groups: Sequence[AnswerGroup], same: Same) -> None:
    """Compare the answers of each group until every one is known to be new or an earlier one."""
    while True:
        questions = [group.questions() for group in groups]
        if not any(questions):
            return
        replies = same([item for items in questions for item in items])
        start = 0
        for group, items in zip(groups, questions, strict=True):
            group.settle(replies[start : start + len(items)])
            start += len(items)


def answer_text(text: str, reads_numbers: bool) -> str | None:
    r"""What a completion gives as its answer; None where it gives none.

    The last `\boxed{...}`; else, for a reward that reads numbers, the number that the text ends up
    with, after `####` if that is there; else what the text calls its answer, or its last line.
    """
    box = (last_box(text) or "").strip()
    if box:
        return box[:MAX_ANSWER_CHARACTERS]
    if not reads_numbers:
        return final_answer(text)[:MAX_ANSWER_CHARACTERS] or None
    number = final_number(text)
    return None if number is None else f"{number.value}{'%' if number.is_percentage else ''}"


def comparing_reward(
    config: RewardConfig, judged_by: int | None = None
) -> RewardFunctionConfig | None:
    """A reward that compares answers, unweighted: the one judged by, or the first; None without.

    Under any other reward answers are equal where their texts are.
    """
    chosen = () if judged_by is None else (config.weighted[judged_by],)
    for function in (*chosen, *config.weighted):
        if function.name in COMPARING_REWARDS:
            return function.model_copy(update={"weight": 1.0})
    return None
