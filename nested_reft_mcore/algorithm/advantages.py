"""Group-relative advantages: a completion is judged against its siblings of the same prompt."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

AdvantageMethod = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"]


def group_relative_advantages(
    rewards: Float[Tensor, " batch"],
    method: AdvantageMethod = "grpo",
    *,
    group_size: int | None = None,
    group_ids: Int64[Tensor, " batch"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Tensor, " batch"]:
    """Advantage of each completion within its group, in the dtype of `rewards`.

    `grpo` (DeepSeekMath, arXiv 2402.03300, eq. 3 with outcome rewards):
    (r - mean) / (std + epsilon), with the sample deviation (n - 1) of the group.
    `dr_grpo` (arXiv 2503.20783): r - mean.
    `rloo` (arXiv 2402.14740): r - mean of the OTHER completions of the group.
    `reinforce_plus_plus_baseline` (arXiv 2501.03262): (r - mean) / (std + epsilon), with the
    deviation of r - mean over the whole batch, which therefore has to be the global one.

    Groups are either runs of `group_size` neighbours or the equal entries of `group_ids`. Equal
    rewards, and so a group of one, give exactly 0. Raises ValueError unless exactly one of the two
    is given, the batch is whole groups and not empty, and rewards are finite.
    """
    if method not in get_args(AdvantageMethod):
        raise ValueError(f"unknown advantage {method!r}: choose one of {get_args(AdvantageMethod)}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("a reward is not finite: a reward function must return a finite number")
    group = _group_index(rewards, group_size, group_ids)
    num_groups = int(group.max()) + 1
    # Relative to the group's least reward first, so that equal rewards are zeros before any
    # rounding, and their mean is exactly zero too.
    lowest = _per_group(rewards.double(), group, num_groups, "amin")
    shifted = rewards.double() - lowest[group]
    deviation = shifted - _per_group(shifted, group, num_groups, "mean")[group]
    if method == "dr_grpo":
        return deviation.to(rewards.dtype)
    if method == "reinforce_plus_plus_baseline":
        spread = deviation.square().mean().sqrt()
        return (deviation / (spread + epsilon)).to(rewards.dtype)
    size = torch.bincount(group, minlength=num_groups)
    if method == "rloo":
        others = (size - 1).clamp(min=1)
        return (deviation * (size.double() / others)[group]).to(rewards.dtype)
    squares = _per_group(deviation.square(), group, num_groups, "sum")
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return (deviation / (std[group] + epsilon)).to(rewards.dtype)


def equal_groups(rewards: Float[Tensor, " batch"], group_size: int) -> Bool[Tensor, " batch"]:
    """Whether a completion's whole group has one reward, and so nothing to prefer."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1).repeat_interleave(group_size)


def _group_index(
    rewards: Float[Tensor, " batch"],
    group_size: int | None,
    group_ids: Int64[Tensor, " batch"] | None,
) -> Int64[Tensor, " batch"]:
    """Group of each completion, numbered from 0 without gaps."""
    if len(rewards) == 0:
        raise ValueError("no rewards: advantages need at least one completion")
    if (group_size is None) == (group_ids is None):
        raise ValueError("give either group_size or group_ids, not both and not neither")
    if group_ids is not None:
        if group_ids.shape != rewards.shape:
            raise ValueError(
                f"group_ids has shape {tuple(group_ids.shape)}, rewards {tuple(rewards.shape)}"
            )
        ordered, order = torch.sort(group_ids)
        is_new = torch.diff(ordered, prepend=ordered[:1]) != 0
        return torch.empty_like(order).scatter_(0, order, is_new.cumsum(0))
    if group_size is None or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of group_size={group_size}")
    return torch.arange(len(rewards), device=rewards.device) // group_size


def _per_group(
    values: Float[Tensor, " batch"],
    group: Int64[Tensor, " batch"],
    num_groups: int,
    reduce: Literal["sum", "mean", "amin"],
) -> Float[Tensor, " groups"]:
    initial = values.new_zeros(num_groups)
    return initial.scatter_reduce(0, group, values, reduce, include_self=False)
