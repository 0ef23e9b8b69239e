"""Every completion there is, for a vocabulary and a length small enough to list them.

A completion ends at the end token or at the largest length, so completions are ragged and their
probabilities add up to 1. What a policy says about all of them is a table: one row of log-probs for
each prefix that goes on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

END = 0
"""The token that ends a completion."""

MAX_SEQUENCES = 4096
"""More than these take minutes and memory that nothing is gained from."""


@dataclass(frozen=True)
class SequenceSpace:
    """All completions over tokens 0 .. vocabulary - 1; ValueError where they are too many."""

    vocabulary: int
    """Tokens, the end token among them."""
    max_length: int
    """Tokens of the longest completion, the end token included where there is one."""

    def __post_init__(self) -> None:
        if self.vocabulary < 2 or self.max_length < 1:
            raise ValueError(
                f"expected at least 2 tokens and a length of at least 1, got {self.vocabulary} and "
                f"{self.max_length}"
            )
        if self.num_sequences > MAX_SEQUENCES:
            raise ValueError(
                f"{self.vocabulary} tokens and {self.max_length} positions make "
                f"{self.num_sequences} completions; at most {MAX_SEQUENCES} are enumerated"
            )

    @property
    def num_sequences(self) -> int:
        """Completions there are: those of the largest length need no end token."""
        others = self.vocabulary - 1
        return sum(others**t for t in range(self.max_length)) + others**self.max_length

    @cached_property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """What a next token is drawn after, shortest first; the empty one is number 0."""
        others = range(1, self.vocabulary)
        return tuple(
            prefix
            for length in range(self.max_length)
            for prefix in itertools.product(others, repeat=length)
        )

    @cached_property
    def prefix_tokens(self) -> Tensor:
        """`[prefixes, max_length]` int64: each prefix behind a start token, which is number
        `vocabulary`, padded with `END`."""
        start = self.vocabulary
        rows = [(start, *p, *(END,) * (self.max_length - 1 - len(p))) for p in self.prefixes]
        return torch.tensor(rows)

    @cached_property
    def prefix_lengths(self) -> Tensor:
        """`[prefixes]` int64, tokens without the start token."""
        return torch.tensor([len(prefix) for prefix in self.prefixes])

    @cached_property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The completions, as tuples of tokens."""
        ended = [(*prefix, END) for prefix in self.prefixes]
        whole = itertools.product(range(1, self.vocabulary), repeat=self.max_length)
        return (*ended, *whole)

    @cached_property
    def lengths(self) -> Tensor:
        """`[sequences]` int64, tokens."""
        return torch.tensor([len(sequence) for sequence in self.sequences])

    @cached_property
    def mask(self) -> Tensor:
        """`[sequences, max_length]` bool: true up to the end of each completion."""
        return torch.arange(self.max_length)[None] < self.lengths[:, None]

    @cached_property
    def truncated(self) -> Tensor:
        """`[sequences]` bool: completions that the largest length cut off before an end token."""
        return torch.tensor([sequence[-1] != END for sequence in self.sequences])

    @cached_property
    def entries(self) -> Tensor:
        """`[sequences, max_length]` int64: where each token stands in a flattened table of
        `[prefixes, vocabulary]`; 0 behind the end."""
        number = {prefix: i for i, prefix in enumerate(self.prefixes)}
        found = torch.zeros(len(self.sequences), self.max_length, dtype=torch.int64)
        for y, sequence in enumerate(self.sequences):
            for t, token in enumerate(sequence):
                found[y, t] = number[sequence[:t]] * self.vocabulary + token
        return found

    def logprobs(self, table: Tensor) -> Tensor:
        """Log-probs of every token of every completion, NaN behind the end.

        Args:
            table: `[prefixes, vocabulary]` log-probs in nats.

        Returns:
            `[sequences, max_length]`, differentiable by the table.
        """
        return torch.where(self.mask, table.flatten()[self.entries], torch.nan)

    def probabilities(self, table: Tensor) -> Tensor:
        """`[sequences]`, adding up to 1; differentiable by the table."""
        return torch.where(self.mask, self.logprobs(table), 0.0).sum(dim=1).exp()

    def verifiable_rewards(self) -> Tensor:
        """`[sequences]` float64: 1 where the tokens, each times its position, add up to a multiple
        of 3, else 0: like an answer's, the reward hangs on every token."""
        return torch.tensor(
            [
                float(sum(t * token for t, token in enumerate(y, 1)) % 3 == 0)
                for y in self.sequences
            ],
            dtype=torch.float64,
        )

    def graded_rewards(self) -> Tensor:
        """`[sequences]` float64: 0, 1/2 or 1, by the same sum modulo 3."""
        return torch.tensor(
            [sum(t * token for t, token in enumerate(y, 1)) % 3 / 2 for y in self.sequences],
            dtype=torch.float64,
        )
