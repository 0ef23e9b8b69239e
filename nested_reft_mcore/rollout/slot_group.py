"""Sequences that one pipeline micro-batch decodes together, and which of them are done.

Every stage keeps the same record from the same sampled tokens, so all agree without a word on who
is done, which rows stay and when the group ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.counter_random import Stream, uniforms
from nested_reft_mcore.rollout.decode_model import Cache, DecodeModel
from nested_reft_mcore.rollout.types import FinishReason, Prompt, SamplingParams


@dataclass
class Completion:
    """One response in the making."""

    sequence: int
    """Its number in the batch: prompt * num_samples + sample."""
    prompt: int
    """Place of its prompt among those given to the engine."""
    sample: int
    """Place in the prompt's group."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    """Absent while it grows."""

    def append(self, token: int, sampling: SamplingParams) -> None:
        """Take the next token, unless finished."""
        if self.finish_reason is not None:
            return
        self.token_ids.append(token)
        if token in sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == sampling.max_new_tokens:
            self.finish_reason = "length"


def cut_into_groups(
    num_prompts: int, num_samples: int, slots_per_group: int, num_stages: int
) -> list[range]:
    """Sequence numbers of each slot group: even cuts, at most `slots_per_group` rows each.

    There are at least as many groups as pipeline stages where there are that many sequences, so
    that every stage has work. A prompt's samples stay together where that is possible, so that it
    is prefilled once.
    """
    whole_prompts = num_samples <= slots_per_group and num_prompts >= num_stages
    unit = num_samples if whole_prompts else 1
    num_units = num_prompts * num_samples // unit
    if num_units == 0:
        return []
    num_groups = max(-(-num_units // (slots_per_group // unit)), min(num_stages, num_units))
    ends = [unit * (num_units * (i + 1) // num_groups) for i in range(num_groups)]
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


class SlotGroup(Generic[Cache]):
    """Rows that move together, one per unfinished completion and a few finished ones."""

    def __init__(
        self,
        model: DecodeModel[Cache],
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        sampling: SamplingParams,
        first_prompt_index: int,
    ) -> None:
        self._sampling = sampling
        self._first_prompt_index = first_prompt_index
        self._device = model.device
        self.rows = list(completions)
        chosen = sorted({completion.prompt for completion in completions})
        token_ids = [prompts[prompt].token_ids for prompt in chosen]
        self.num_generated = 0
        """Tokens that every unfinished row has so far."""
        self.prompt_lengths = self._tensor([len(ids) for ids in token_ids])
        """`[prompts]`, one for each distinct prompt."""
        longest = max(len(ids) for ids in token_ids)
        self.prompt_tokens = self._tensor(
            [[*ids, *[0] * (longest - len(ids))] for ids in token_ids]
        )
        """`[prompts, longest]`, right-padded."""
        self.source = self._tensor([chosen.index(completion.prompt) for completion in completions])
        """`[rows]`: which of the distinct prompts a row continues."""
        self._row_prompt_lengths = [len(prompts[c.prompt].token_ids) for c in completions]
        self.last_tokens = self.source.new_empty(0)
        """`[rows]`: what was sampled last; empty before the prefill."""
        self.cache = model.new_cache(self.source, longest + sampling.max_new_tokens - 1)
        self._index_rows()

    @property
    def is_prefilled(self) -> bool:
        """Whether the first tokens are there."""
        return self.num_generated > 0

    @property
    def is_done(self) -> bool:
        """Whether every completion of the group is finished."""
        return all(row.finish_reason is not None for row in self.rows)

    @property
    def positions(self) -> Int64[Tensor, " rows"]:
        """Where each row's last token stands in its sequence."""
        return self._starts + (self.num_generated - 1)

    @property
    def span(self) -> int:
        """One more than the largest position."""
        return max(self._row_prompt_lengths) + self.num_generated

    @property
    def is_ragged(self) -> bool:
        """Whether positions differ between rows."""
        return max(self._row_prompt_lengths) != min(self._row_prompt_lengths)

    def uniforms(self) -> Float64[Tensor, " rows"]:
        """The random numbers that the rows' next tokens are drawn with."""
        return uniforms(
            int(Stream.SAMPLING),
            self._sampling.seed,
            self._sampling.step,
            self._prompt_indices,
            self._sample_indices,
            self.num_generated,
        )

    def accept(self, tokens: Int64[Tensor, " rows"]) -> None:
        """Take what was sampled; finished rows leave once they are half of all rows.

        Leaving only then bounds what moving the cache costs by what computing it cost.
        """
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token, self._sampling)
        self.num_generated += 1
        self.last_tokens = tokens
        kept = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        if 0 < 2 * len(kept) <= len(self.rows):
            self._keep(kept)

    def _keep(self, kept: list[int]) -> None:
        indices = self._tensor(kept)
        self.rows = [self.rows[i] for i in kept]
        self._row_prompt_lengths = [self._row_prompt_lengths[i] for i in kept]
        self.source = self.source[indices]
        self.last_tokens = self.last_tokens[indices]
        self.cache.select(indices)
        self._index_rows()

    def _index_rows(self) -> None:
        self._starts = self._tensor(self._row_prompt_lengths)
        self._prompt_indices = self._tensor(
            [r.prompt + self._first_prompt_index for r in self.rows]
        )
        self._sample_indices = self._tensor([row.sample for row in self.rows])
        self.sequence_numbers = self._tensor([row.sequence for row in self.rows])
        """`[rows]`: the completions' numbers in the batch."""

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
