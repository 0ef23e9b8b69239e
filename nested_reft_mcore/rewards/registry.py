"""Rewards by name. Their modules are imported only where they are used: in the workers."""

from __future__ import annotations

import importlib

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards.base import RewardFunction

REWARDS = {
    "numeric_match": "nested_reft_mcore.rewards.numeric_match:numeric_match",
    "math_verify": "nested_reft_mcore.rewards.math_verify:math_verify_reward",
}
"""Name to `module:function`."""


def load_reward(name: str) -> RewardFunction:
    """The reward called `name`, or the one at `module:function`. UserError if there is none."""
    module_name, colon, function_name = REWARDS.get(name, name).partition(":")
    if not colon:
        raise UserError(
            f"reward.name is {name!r}; expected one of {', '.join(sorted(REWARDS))}, or "
            "module:function"
        )
    try:
        reward = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward.name is {name!r}: cannot be imported: {error}") from error
    return reward
