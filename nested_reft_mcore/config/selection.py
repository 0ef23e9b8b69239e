"""Which prompts a step is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nested_reft_mcore.config.base import Section


class SelectionConfig(Section):
    """Which prompts a step takes from the stream; docs/data.md has the formulas."""

    policy: Literal["uniform", "filter", "mopps"] = "uniform"
    """All in turn; pass over solved and hopeless ones; or those near a target success rate."""
    solved_at: float = Field(default=1.0, gt=0, le=1)
    """`filter`: a group whose mean score is at least this counts as solved."""
    hopeless_at: float = Field(default=0.0, ge=0, lt=1)
    """`filter`: a group whose mean score is at most this counts as hopeless."""
    patience: int = Field(default=1, gt=0)
    """`filter`: so many solved, or hopeless, groups in a row send a prompt to rest."""
    rest: int = Field(default=2, ge=0)
    """`filter`: a resting prompt is passed over so many times; 0: for ever."""
    target: float = Field(default=0.5, gt=0, lt=1)
    """`mopps`: success rate that is looked for (arXiv 2507.04632)."""
    candidates: int = Field(default=16, gt=0)
    """`mopps`: prompts looked at for each one that is taken."""
    decay: float = Field(default=0.8, ge=0, le=1)
    """`mopps`: how much of what was seen before still counts when a prompt is seen again."""
    sampler: Literal["thompson", "ucb"] = "thompson"
    """`mopps`: a draw from each posterior, or its mean with a bonus for doubt."""
    ucb_bonus: float = Field(default=1.0, ge=0)
    """`mopps` with `ucb`: standard deviations by which doubt brings a prompt nearer the target."""
    prior_success: float = Field(default=1.0, gt=0)
    """`mopps`: successes of the prior Beta distribution."""
    prior_failure: float = Field(default=1.0, gt=0)
    """`mopps`: failures of the prior Beta distribution."""
