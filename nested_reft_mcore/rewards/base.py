"""What a reward judges, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RewardItem:
    """One completion to judge."""

    prompt: str
    """The question as text."""
    completion: str
    """What the policy wrote, special tokens left out."""
    answer: str
    """What was expected."""


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one completion."""

    value: float
    """The reward; 0 if judging failed."""
    error: str | None = None
    """Why judging failed: an exception, a crash or the deadline."""
    timed_out: bool = False
    """Whether it was the deadline."""


RewardFunction = Callable[[RewardItem], float]
"""A reward: finite, and a function of the item alone. It may raise, hang or crash."""
