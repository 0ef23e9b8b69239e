"""Sums and means over the positions of a mask, with the denominator always said by the caller."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def fill_masked(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], fill: float = 0.0
) -> Float[Tensor, "*shape"]:
    """`values` where `mask` is true, `fill` elsewhere.

    Apply it before any arithmetic: then a masked NaN or infinity reaches neither the result nor,
    as 0 * NaN, the gradient.
    """
    return torch.where(mask, values, fill)


def masked_sum(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """Sum of `values` where `mask` is true, accumulated in `dtype` (default: that of `values`)."""
    return fill_masked(values, mask).sum(dtype=dtype)


def masked_mean(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    denominator: Int64[Tensor, ""] | Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """`masked_sum` over a denominator of the caller, such as the global number of tokens.

    The mask's own count is never implied: on one rank or in one micro-batch it is the wrong one.
    """
    return masked_sum(values, mask) / denominator
