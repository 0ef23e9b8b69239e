"""A decode model without a transformer, to test what surrounds one.

Its logits hang on every token so far and on its position, so a row that is mixed up with another,
a token that is lost or a prefix that is copied wrongly shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.rollout.pipeline_link import PipelineLink
from nested_reft_mcore.rollout.token_pass import TokenPass

VOCAB_SIZE = 11
NUM_STATES = 1009
PLAN = LayerSkipPlan.full(2)
DRAFT_PLAN = LayerSkipPlan.parse("1", 2)
UNWRITTEN = -(10**9)


class StateCache:
    """One state for each position of each slot."""

    def __init__(self, num_slots: int, length: int) -> None:
        self.states = torch.full((num_slots, length), UNWRITTEN)
        self.cleared: list[int] = []

    @property
    def num_bytes(self) -> int:
        return self.states.nbytes

    def clear(self, slots: Sequence[int]) -> None:
        self.states[list(slots)] = UNWRITTEN
        self.cleared += slots


class HashModel:
    """A finite automaton over (state, token, position); its state picks a row of logits."""

    def __init__(self) -> None:
        self.link = PipelineLink()
        self.num_chunks = 1
        self.tensor_group = None
        self.vocab_start = 0
        self.vocab_size = VOCAB_SIZE
        self.max_length = 64
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.stage_of_layer = (0, 0)
        self.plan = PLAN
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(NUM_STATES, VOCAB_SIZE, generator=generator)
        # What drafts: near the table, but not the same.
        self.draft_table = self.table + 0.7 * torch.randn(self.table.shape, generator=generator)
        self.rows_run = 0
        self.passes: list[TokenPass] = []
        self.caches: list[StateCache] = []
        self.room = 10**9

    def begin(self) -> None:
        self.rows_run = 0
        self.passes = []

    def executions(self) -> Tensor:
        return torch.full((2, 2), len(self.passes))

    def hidden_shape(self, num_tokens: int) -> tuple[int, ...]:
        return (num_tokens, 1)

    def kv_bytes(self, plan: LayerSkipPlan, num_slots: int, length: int) -> int:
        return 8 * num_slots * length

    def free_bytes(self) -> int:
        return self.room

    def agree_on_least(self, number: int) -> int:
        return number

    def new_cache(self, plan: LayerSkipPlan, num_slots: int, length: int) -> StateCache:
        self.caches.append(StateCache(num_slots, length))
        return self.caches[-1]

    def step(self, states: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        return (states * 31 + tokens * 7 + positions * 3 + 1) % NUM_STATES

    def forward(
        self, chunk: int, inputs: Tensor, tokens: TokenPass, cache: StateCache, plan: LayerSkipPlan
    ) -> Tensor:
        assert inputs.shape == (tokens.num_tokens,)
        assert len(set(tokens.slots.tolist())) == len(tokens.slots), "a slot has two rows"
        self.passes.append(tokens)
        place = tokens.num_row_tokens
        for piece in tokens.pieces:
            ids = inputs[place : place + piece.length]
            place += piece.length
            for offset, token in enumerate(ids):
                self._write(cache, torch.tensor([piece.slot]), piece.start + offset, token[None])
        for copy in tokens.copies:
            states = cache.states[copy.source, : copy.length]
            assert (states != UNWRITTEN).all(), "a prefix was copied before it was there"
            cache.states[list(copy.targets), : copy.length] = states
        rows = inputs[: tokens.num_row_tokens].view(-1, tokens.width)
        found = [
            self._write(cache, tokens.slots, tokens.positions + offset, rows[:, offset])
            for offset in range(tokens.width)
        ]
        if len(tokens.slots):
            assert int(tokens.positions.max()) + tokens.width == tokens.span
        self.rows_run += tokens.num_row_tokens
        table = self.table if plan == PLAN else self.draft_table
        return table[torch.stack(found, dim=1).flatten()]

    def _write(
        self, cache: StateCache, slots: Tensor, positions: Tensor | int, tokens: Tensor
    ) -> Tensor:
        positions = torch.as_tensor(positions).expand_as(slots)
        before = torch.where(positions > 0, cache.states[slots, (positions - 1).clamp(min=0)], 0)
        assert (before != UNWRITTEN).all(), "a token came before the one before it"
        states = self.step(before, tokens, positions)
        cache.states[slots, positions] = states
        return states
