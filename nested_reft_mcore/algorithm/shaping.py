"""Rewards that also look at how long a completion is."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor


def overlong_penalty(
    lengths: Int64[Tensor, " batch"], max_length: int, buffer: int, factor: float = 1.0
) -> Float[Tensor, " batch"]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), float32, from -factor to 0.

    0 up to `max_length - buffer` tokens, then linearly down to -factor at `max_length`. Raises
    ValueError unless 0 < buffer <= max_length and factor >= 0.
    """
    if not 0 < buffer <= max_length or factor < 0:
        raise ValueError(
            "overlong shaping needs 0 < buffer <= max_length and factor >= 0, got "
            f"buffer={buffer}, max_length={max_length}, factor={factor}"
        )
    excess = (lengths - (max_length - buffer)).clamp(min=0, max=buffer)
    return -factor * excess.float() / buffer


def length_penalty(
    lengths: Int64[Tensor, " batch"], max_length: int, coefficient: float
) -> Float[Tensor, " batch"]:
    """-coefficient * length / max_length, float32: shorter completions are worth more."""
    return -coefficient * lengths.float() / max_length
