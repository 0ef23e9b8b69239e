"""Prompts with their responses as rows, aligned with `labels` (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class Rows(NamedTuple):
    """Right-padded sequences."""

    tokens: Int64[Tensor, "batch seq"]
    """Prompt and response without the last token."""
    labels: Int64[Tensor, "batch seq"]
    """Prompt and response without the first token."""
    position_ids: Int64[Tensor, "batch seq"]
    """0, 1, 2, ... in every row."""
    response_mask: Bool[Tensor, "batch seq"]
    """True where the label belongs to the response."""


def lay_out(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_token_id: int,
    pad_to_multiple: int = 1,
    length: int | None = None,
) -> Rows:
    """Rows of (prompt, response) pairs, in order; at least one, and no prompt is empty.

    `length` fixes `seq`; left out, it is the longest row rounded up to `pad_to_multiple`.
    ValueError for rows that don't fit.
    """
    longest = max(len(prompt) + len(response) - 1 for prompt, response in sequences)
    if length is None:
        length = -(-longest // pad_to_multiple) * pad_to_multiple
    if longest > length or length % pad_to_multiple:
        raise ValueError(
            f"length {length} must be a multiple of {pad_to_multiple} and at least {longest}"
        )
    shape = (len(sequences), length)
    tokens = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, pad_token_id, dtype=torch.int64)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        sequence = torch.tensor([*prompt, *response])
        end = len(sequence) - 1
        tokens[row, :end] = sequence[:-1]
        labels[row, :end] = sequence[1:]
        response_mask[row, len(prompt) - 1 : end] = True
    position_ids = torch.arange(length).repeat(len(sequences), 1)
    return Rows(tokens, labels, position_ids, response_mask)
