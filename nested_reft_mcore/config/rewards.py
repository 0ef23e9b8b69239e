"""Options of rewards: which functions judge a completion, and what their workers may use."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from pydantic import Field

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError

DEFAULT_REWARD = "numeric_match"
REWARD_NAMES = (
    "numeric_match",
    "math_verify",
    "exact_match",
    "multiple_choice",
    "format",
    "length",
    "relative_length",
)
"""Rewards that are known by name alone; `rewards.registry` has their modules."""
COMPARING_REWARDS = ("math_verify", "numeric_match", "multiple_choice", "exact_match")
"""Rewards that say whether a completion gives a certain answer, and so whether two answers are
equal: 0 or 1, whose mean is an accuracy."""
SHAPING_REWARDS = ("format", "length", "relative_length")
"""Rewards that say nothing about the answer."""
WEIGHTED_SUM = "weighted_sum"
"""Name of the figures of an evaluation by all reward functions together."""
_OWN_FUNCTION = re.compile(r"(?:[^:]+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
_LABEL = re.compile(r"[\w.-]+")


class RewardFunctionConfig(Section):
    """One reward of a weighted sum."""

    name: str
    """A reward by name (docs/adding_a_reward.md), `module:function` or `file.py:function`."""
    weight: float = 1.0
    """What its value is multiplied by in the sum; 0 only logs it."""
    label: str | None = None
    """Its name in metrics, `reward/<label>/mean`; left out: the function's own name."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments for the function."""

    @property
    def metric_name(self) -> str:
        """`label`, or the function's own name."""
        return self.label or self.name.rpartition(":")[2]


class RewardConfig(Section):
    """Verifiable rewards, judged in worker processes."""

    name: str | None = None
    """The only reward, by name or `module:function`; left out: `numeric_match` or `functions`."""
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Several rewards, or one with options; a completion's reward is their weighted sum."""
    num_workers: int = Field(default=1, gt=0)
    """Worker processes."""
    deadline_seconds: float = Field(default=10.0, gt=0)
    """Longest call of a function; a completion it was judging gets reward 0 and is counted."""
    start_timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest import of the functions' modules, once a worker; longer ends the run."""
    memory_limit_gb: float = Field(default=4.0, gt=0)
    """Address space of a worker, in 10^9 bytes; a function that needs torch needs more."""
    overlong_buffer_len: int = Field(default=0, ge=0)
    """Soft overlong punishment over the last so many tokens (arXiv 2503.14476); 0 turns it off."""
    overlong_penalty_factor: float = Field(default=1.0, ge=0)
    """What a completion of full length loses by it."""
    length_penalty: float = Field(default=0.0, ge=0)
    """A completion of n tokens loses this times n / `rollout.max_new_tokens`."""

    @property
    def weighted(self) -> tuple[RewardFunctionConfig, ...]:
        """The functions, also where only `name` or nothing is given; at least one."""
        return self.functions or (RewardFunctionConfig(name=self.name or DEFAULT_REWARD),)


def evaluated_place(reward: RewardConfig, label: str | None) -> int | None:
    """Which of `reward.weighted` evaluations judge by; None for the weighted sum of all.

    The one that `label` (`evaluation.reward`) names; without it the only function, or else the only
    one that compares answers.

    Raises:
        UserError: no function has this label.
    """
    functions = reward.weighted
    labels = [function.metric_name for function in functions]
    if label is not None:
        if label not in labels:
            raise UserError(f"evaluation.reward={label}; expected one of {', '.join(labels)}")
        return labels.index(label)
    if len(functions) == 1:
        return 0
    comparing = [i for i, one in enumerate(functions) if one.name in COMPARING_REWARDS]
    return comparing[0] if len(comparing) == 1 else None


def evaluated_measure(reward: RewardConfig, label: str | None) -> str:
    """What the figures of evaluations are called in metrics: `reward` where it is an accuracy.

    Else the label of the reward that says nothing about the answer, or `weighted_sum`.
    """
    place = evaluated_place(reward, label)
    if place is None:
        return WEIGHTED_SUM
    chosen = reward.weighted[place]
    return chosen.metric_name if chosen.name in SHAPING_REWARDS else "reward"


def check_reward(reward: RewardConfig) -> None:
    """Refuse rewards that nobody knows, or whose metrics would have one name.

    Raises:
        UserError: names the option, what it says and what was expected.
    """
    if reward.name is not None and reward.functions:
        raise UserError(
            f"reward.name={reward.name} beside reward.functions; expected one of them (put "
            f"{reward.name} into reward.functions)"
        )
    taken: dict[str, str] = {}
    for place, function in enumerate(reward.weighted):
        key = f"reward.functions.{place}" if reward.functions else "reward"
        check_reward_name(function.name, f"{key}.name")
        label = function.metric_name
        if not _LABEL.fullmatch(label):
            raise UserError(
                f"{key}.label: expected letters, digits, `_`, `.` and `-`; got {label!r}"
            )
        if label in taken:
            raise UserError(
                f"{key}: its metric reward/{label}/mean is that of {taken[label]} too; give one "
                "of them a label"
            )
        taken[label] = key


def check_reward_name(name: str, key: str) -> None:
    """Refuse a name that is no reward's and no `module:function`.

    Raises:
        UserError: starts with `key`, says what was expected, and the nearest name.
    """
    if name in REWARD_NAMES or _OWN_FUNCTION.fullmatch(name):
        return
    near = difflib.get_close_matches(name, REWARD_NAMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"{key} is {name!r}; expected one of {', '.join(sorted(REWARD_NAMES))}, or "
        f"module:function, or file.py:function{hint}"
    )


def check_reward_files(reward: RewardConfig) -> None:
    """Refuse a `file.py:function` whose file is not there.

    Raises:
        UserError: names the option, the path, and where relative paths start.
    """
    for function in reward.weighted:
        path, colon, _ = function.name.rpartition(":")
        if colon and path.endswith(".py") and not Path(path).is_file():
            raise UserError(f"reward: {path} does not exist (taken from {Path.cwd()})")
