"""Three rewards for the demo's task: one completion, a group, and the batch at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nested_reft_mcore.rewards.base import RewardItem, batch_reward, group_reward


def shows_work(item: RewardItem, *, mark: str = ">") -> float:
    """1 for a completion that writes down the running values, as in `> 8 , 6 , 7 , 3`."""
    return float(item.completion.lstrip().startswith(mark))


@group_reward
def agrees(items: Sequence[RewardItem]) -> list[float]:
    """The share of the prompt's completions that end with the same word: self-consistency."""
    ends = [item.completion.split()[-1:] for item in items]
    counts = Counter(map(tuple, ends))
    return [counts[tuple(end)] / len(items) if end else 0.0 for end in ends]


@batch_reward
def is_rare(items: Sequence[RewardItem]) -> list[float]:
    """1 for a completion that nobody else in the step's batch has written."""
    counts = Counter(item.completion for item in items)
    return [float(counts[item.completion] == 1) for item in items]
