"""Group-relative advantages."""

import statistics

import pytest
import torch

from nested_reft_mcore.algorithm.advantages import group_relative_advantages


def test_grpo_normalises_by_the_sample_deviation():
    rewards = [[1.0, 0.0, 0.0, 0.5], [2.0, 3.0, 7.0, -1.0]]
    want = [
        (r - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
        for group in rewards
        for r in group
    ]
    flat = torch.tensor(rewards, dtype=torch.float64).flatten()
    got = group_relative_advantages(flat, "grpo", group_size=4)
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_epsilon_bounds_the_normalisation():
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float64)
    got = group_relative_advantages(rewards, "grpo", group_size=2, epsilon=0.5)
    assert got.tolist() == pytest.approx([-0.5 / (0.5**0.5 + 0.5), 0.5 / (0.5**0.5 + 0.5)])


@pytest.mark.parametrize("size", [2, 4, 7])
def test_rloo_compares_with_the_mean_of_the_others(size):
    rewards = [1.0, 0.0, 0.25, 3.0, -2.0, 0.5, 0.5, 7.0, 1.5, 2.0, 0.1, 4.0, -1.0, 0.3][: 2 * size]
    want = [
        r - statistics.fmean(group[:i] + group[i + 1 :])
        for group in (rewards[:size], rewards[size:])
        for i, r in enumerate(group)
    ]
    flat = torch.tensor(rewards, dtype=torch.float64)
    got = group_relative_advantages(flat, "rloo", group_size=size)
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_dr_grpo_only_centres():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 4.0, 2.0, 2.0, 0.0])
    got = group_relative_advantages(rewards, "dr_grpo", group_size=4)
    assert got.tolist() == [0.75, -0.25, -0.25, -0.25, 2.0, 0.0, 0.0, -2.0]
    assert got.dtype == torch.float32


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1e30, 1e-30])
@pytest.mark.parametrize("size", [1, 3, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(method, value, size, dtype):
    rewards = torch.full((2 * size,), value, dtype=dtype)
    rewards[size:] += 1.0
    got = group_relative_advantages(rewards, method, group_size=size)
    assert got.tolist() == [0.0] * (2 * size)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo"])
def test_group_ids_may_come_in_any_order(method):
    torch.manual_seed(0)
    rewards = torch.rand(12)
    by_size = group_relative_advantages(rewards, method, group_size=4)
    order = torch.randperm(12)
    ids = torch.tensor([90, -5, 17]).repeat_interleave(4)
    by_id = group_relative_advantages(rewards[order], method, group_ids=ids[order])
    torch.testing.assert_close(by_id, by_size[order], rtol=1e-6, atol=1e-7)


def test_groups_do_not_influence_each_other():
    first = torch.tensor([0.0, 1.0, 1.0])
    alone = group_relative_advantages(first, group_size=3)
    beside = group_relative_advantages(torch.cat([first, torch.rand(6) * 100]), group_size=3)
    assert beside[:3].tolist() == alone.tolist()


def test_mistakes_are_refused():
    rewards = torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="3 rewards are not whole groups of group_size=2"):
        group_relative_advantages(rewards, group_size=2)
    with pytest.raises(ValueError, match="either group_size or group_ids"):
        group_relative_advantages(rewards)
    with pytest.raises(ValueError, match="either group_size or group_ids"):
        group_relative_advantages(rewards, group_size=3, group_ids=torch.zeros(3).long())
    with pytest.raises(ValueError, match="not finite"):
        group_relative_advantages(torch.tensor([0.0, float("nan")]), group_size=2)
    with pytest.raises(ValueError, match="at least one completion"):
        group_relative_advantages(torch.tensor([]), group_size=2)


def test_reinforce_plus_plus_divides_by_the_deviation_of_the_whole_batch():
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0, 4.0], dtype=torch.float64)
    # Less the means 1/3 and 4; squares 2/3 and 2, a sixth of their sum is 4/9.
    want = [r / (2 / 3 + 1e-6) for r in (2 / 3, -1 / 3, -1 / 3, -1.0, 1.0, 0.0)]
    got = group_relative_advantages(rewards, "reinforce_plus_plus_baseline", group_size=3)
    assert got.tolist() == pytest.approx(want, rel=1e-12)
