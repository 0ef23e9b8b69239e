"""What a reward judges, what it says, and the three kinds of reward functions.

A reward function takes one item and returns a finite number. One that has to see all completions of
a prompt is marked by `group_reward`, one that has to see the whole batch by `batch_reward`; these
take a sequence of items and return as many numbers, in order. Any of them may have keyword
parameters, which the configuration's `options` fill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Scope = Literal["item", "group", "batch"]
"""What one call of a function judges."""
SCOPE_ATTRIBUTE = "reward_scope"


@dataclass(frozen=True)
class RewardItem:
    """One completion to judge. Fields may be added; functions read those that they know."""

    prompt: str
    """What the policy read, as text."""
    completion: str
    """What the policy wrote, special tokens left out."""
    answer: str
    """What was expected; empty where the data has none."""
    group: int = 0
    """Which prompt of the batch it answers: completions with the same number are a group."""
    num_tokens: int | None = None
    """Tokens of the completion, the one that ended it included; None where nobody counted."""
    is_truncated: bool = False
    """Whether it was cut off at the longest length instead of ending itself."""
    dataset: str = ""
    """Which data set the prompt is from."""
    question: str = ""
    """The question alone: no template, suffix or examples."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What else the data says about the prompt, such as level or subject: JSON values."""


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one completion."""

    value: float
    """The weighted sum of all functions; 0 if any of them failed."""
    error: str | None = None
    """Why judging failed: an exception, a crash or the deadline."""
    timed_out: bool = False
    """Whether it was the deadline."""
    components: tuple[float, ...] = ()
    """What each function gave, without its weight; 0 where it failed."""


RewardFunction = Callable[..., float]
"""`(item, **options) -> number`. It may raise, hang or crash: that costs its item."""
GroupFunction = Callable[..., Sequence[float]]
"""`(items, **options) -> numbers`, as many as items. If it fails all of its items are lost."""
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def group_reward(function: AnyFunction) -> AnyFunction:
    """Mark a function that judges all completions of one prompt together."""
    setattr(function, SCOPE_ATTRIBUTE, "group")
    return function


def batch_reward(function: AnyFunction) -> AnyFunction:
    """Mark a function that judges all completions of a step together, whatever the layout.

    They come in the order of the global batch, groups side by side, as one call in one worker.
    """
    setattr(function, SCOPE_ATTRIBUTE, "batch")
    return function


def scope_of(function: Callable[..., Any]) -> Scope:
    """What one call of a function judges; `item` unless it is marked."""
    return getattr(function, SCOPE_ATTRIBUTE, "item")
