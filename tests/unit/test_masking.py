"""Masked sums: what the mask hides is not there, in value and in gradient."""

import jaxtyping
import pytest
import torch

from nested_reft_mcore.algorithm.masking import fill_masked, masked_mean, masked_sum

NAN = float("nan")


def test_masked_values_do_not_count():
    values = torch.tensor([[1.0, NAN, 3.0], [float("inf"), 5.0, -float("inf")]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert fill_masked(values, mask).tolist() == [[1, 0, 3], [0, 5, 0]]
    assert masked_sum(values, mask).item() == 9
    assert masked_mean(values, mask, 4).item() == 9 / 4
    assert masked_mean(values, mask, torch.tensor(6)).item() == 1.5


def test_masked_gradient_is_exactly_zero():
    values = torch.tensor([1.0, 0.0, 4.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    # log has an infinite slope at the masked 0.
    masked_sum(fill_masked(values, mask, 1.0).log(), mask).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.25]


def test_sum_accumulates_in_the_wanted_type():
    values = torch.full((1000,), 0.1)
    mask = torch.ones(1000, dtype=torch.bool)
    total = masked_sum(values, mask, torch.float64)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(1000 * torch.tensor(0.1).item(), rel=1e-15)


def test_shapes_are_checked_while_testing():
    """The import hook of conftest is on: a mask of another shape is an error, not a broadcast."""
    with pytest.raises(jaxtyping.TypeCheckError):
        masked_sum(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
