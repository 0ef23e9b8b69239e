"""Tokens that go through the model together: what the scheduler hands to every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class PromptPiece:
    """A run of prompt tokens whose keys and values are to be written; nothing is sampled there."""

    slot: int
    """Where its keys and values go; earlier tokens of the prompt lie there already."""
    start: int
    """Position of the first token."""
    length: int
    """Number of tokens, at consecutive positions."""


@dataclass(frozen=True)
class PrefixCopy:
    """Keys and values of a prompt that other samples of it take over."""

    source: int
    """Slot that holds positions 0 to `length` - 1."""
    targets: tuple[int, ...]
    """Slots that get them."""
    length: int
    """Number of positions."""


@dataclass(frozen=True)
class TokenPass:
    """One pass of a slot group: rows that decode, then pieces of prompts.

    Tokens lie row by row, `width` for each row, then piece by piece. In every layer keys and values
    of all tokens are written first, then the copies are made, then everything attends: a row may
    look at a prompt that is prefilled or copied in the same pass. A token attends to positions up
    to its own in its slot.
    """

    slots: Int64[Tensor, " rows"]
    """Slot of each row."""
    positions: Int64[Tensor, " rows"]
    """Position of each row's first token."""
    width: int
    """Tokens of each row, at consecutive positions: 1, or more where drafts are verified."""
    span: int
    """One more than the largest position of a row's last token; 0 without rows."""
    pieces: tuple[PromptPiece, ...] = ()
    copies: tuple[PrefixCopy, ...] = ()

    @property
    def num_row_tokens(self) -> int:
        """Tokens whose logits are wanted."""
        return self.slots.shape[0] * self.width

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.num_row_tokens + sum(piece.length for piece in self.pieces)
