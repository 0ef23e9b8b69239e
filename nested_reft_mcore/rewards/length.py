"""Rewards for how long a completion is: alone, or beside the others of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from nested_reft_mcore.rewards.base import RewardItem, group_reward
from nested_reft_mcore.rewards.registry import load_reward


def length_within(
    item: RewardItem, *, max_tokens: int, min_tokens: int = 0, buffer_tokens: int = 0
) -> float:
    """1.0 between `min_tokens` and `max_tokens`, 0.0 outside, a straight line in between.

    The line is `buffer_tokens` long: the reward is 0 from `max_tokens + buffer_tokens` on, and up
    to `min_tokens - buffer_tokens`. ValueError for limits that contradict each other, or where
    nobody has counted the tokens.
    """
    if not 0 <= min_tokens <= max_tokens or buffer_tokens < 0:
        raise ValueError(
            f"min_tokens={min_tokens}, max_tokens={max_tokens}, buffer_tokens={buffer_tokens}: "
            "expected 0 <= min_tokens <= max_tokens and a buffer of 0 or more"
        )
    length = _length(item)
    beyond = max(length - max_tokens, min_tokens - length, 0)
    if beyond == 0:
        return 1.0
    return max(0.0, 1.0 - beyond / buffer_tokens) if buffer_tokens else 0.0


@group_reward
def relative_length(
    items: Sequence[RewardItem], *, correct_by: str | None = "numeric_match"
) -> list[float]:
    """From 0.5 for the shortest completion of a prompt to -0.5 for the longest.

    Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3): 0.5 - (length - least) / (most -
    least), 0 where all have one length, and at most 0 for a wrong answer. What is right says the
    reward `correct_by`, by more than 0; with null all count as right. ValueError where nobody has
    counted the tokens.
    """
    lengths = [_length(item) for item in items]
    least, most = min(lengths), max(lengths)
    if least == most:
        return [0.0] * len(items)
    values = [0.5 - (length - least) / (most - least) for length in lengths]
    if correct_by is None:
        return values
    correct = load_reward(correct_by)
    if correct.scope != "item":
        raise ValueError(f"correct_by is {correct_by!r}; expected a reward that judges one item")
    return [
        value if correct.function(item) > 0 else min(0.0, value)
        for item, value in zip(items, values, strict=True)
    ]


def _length(item: RewardItem) -> int:
    if item.num_tokens is None:
        raise ValueError("the tokens of this completion were not counted")
    return item.num_tokens
