"""From the logits of a step to its tokens, and the record of their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from nested_reft_mcore.algorithm.counter_random import Stream, uniforms
from nested_reft_mcore.rollout.decode_model import DecodeModel
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.scheduler import Row, Step
from nested_reft_mcore.rollout.speculation import Proposal, propose, verify
from nested_reft_mcore.rollout.types import SamplingParams


class Drawing:
    """The last pipeline stage's part of a generation; the others hold an empty record.

    Every number that decides a token is keyed by (seed, step, index of the prompt in the global
    batch, sample, position in the response), so neither slots nor batches matter.
    """

    def __init__(
        self,
        model: DecodeModel,
        sampling: SamplingParams,
        *,
        num_sequences: int,
        num_slots: int,
        most_drafted: int,
        prompt_indices: Sequence[int],
    ) -> None:
        """`most_drafted`: tokens that a row may draft before they are verified."""
        self._sampling = sampling
        self._prompt_indices = prompt_indices
        self._device = model.device
        self._shard = {
            "vocab_start": model.vocab_start,
            "vocab_size": model.vocab_size,
            "group": model.tensor_group,
        }
        # A pass may verify tokens that lie beyond the end of a response.
        num_columns = sampling.max_new_tokens + most_drafted + 1
        self.logprobs: Float32[Tensor, "sequences columns"] = torch.zeros(
            num_sequences, num_columns, device=model.device
        )
        """Nats, a completion's tokens from column 0 on; what follows them means nothing."""
        self._uniforms: Float64[Tensor, "slots columns"] | None = None
        if model.link.is_last:
            self._uniforms = torch.zeros(
                num_slots, num_columns, dtype=torch.float64, device=model.device
            )
        self._sequence_in_slot = [-1] * num_slots
        self._proposals: dict[int, list[Proposal]] = {}
        """For each lane, its rows' drafts so far."""

    def draw(
        self, step: Step, logits: Float32[Tensor, "tokens vocab"]
    ) -> Int64[Tensor, "rows width"]:
        """The step's tokens, the same on every tensor-parallel rank.

        `logits`: this rank's columns, for each token of the step's rows. Later tokens of a row are
        NO_TOKEN where verification ended it.
        """
        rows = step.rows
        slots = self._tensor([row.slot for row in rows])
        places = self._tensor(
            [len(row.completion.token_ids) + len(row.drafts) * step.is_draft for row in rows]
        )
        if step.is_draft:
            proposal = propose(
                logits, self._uniform(rows, slots, places), self._sampling, **self._shard
            )
            self._proposals.setdefault(step.lane, []).append(proposal)
            return proposal.tokens[:, None]
        sequences = self._tensor([row.completion.sequence for row in rows])
        if step.num_drafted:
            tokens, logprobs = verify(
                logits.unflatten(0, (len(rows), step.width)),
                self._proposals.pop(step.lane),
                self._verification_uniforms(rows, places, step.width),
                self._sampling,
                **self._shard,
            )
            columns = places[:, None] + torch.arange(step.width, device=self._device)
            self.logprobs[sequences[:, None], columns] = logprobs
            return tokens
        uniform = self._uniform(rows, slots, places)
        token, logprob = sample_tokens(logits, uniform, self._sampling, **self._shard)
        self.logprobs[sequences, places] = logprob
        return token[:, None]

    def _uniform(
        self, rows: Sequence[Row], slots: Tensor, places: Tensor
    ) -> Float64[Tensor, " rows"]:
        """The numbers behind the rows' next tokens, computed when a sequence gets its slot."""
        assert self._uniforms is not None, "only the last stage draws"
        new = [row for row in rows if self._sequence_in_slot[row.slot] != row.completion.sequence]
        if new:
            columns = torch.arange(self._uniforms.shape[1], device=self._device)
            self._uniforms[self._tensor([row.slot for row in new])] = uniforms(
                int(Stream.SAMPLING), *self._keys(new), columns
            )
            for row in new:
                self._sequence_in_slot[row.slot] = row.completion.sequence
        return self._uniforms[slots, places]

    def _verification_uniforms(
        self, rows: Sequence[Row], places: Tensor, width: int
    ) -> Float64[Tensor, "rows width 2"]:
        """For each token of each row: whether a draft is accepted, and what replaces it."""
        columns = places[:, None] + torch.arange(width, device=self._device)
        keys = self._keys(rows)
        return torch.stack(
            [
                uniforms(int(stream), *keys, columns)
                for stream in (Stream.ACCEPTANCE, Stream.RESIDUAL)
            ],
            dim=-1,
        )

    def _keys(self, rows: Sequence[Row]) -> tuple[int | Tensor, ...]:
        """Seed, step, prompt and sample of each row."""
        prompts = self._tensor([self._prompt_indices[r.completion.prompt] for r in rows])
        samples = self._tensor([row.completion.sample for row in rows])
        return self._sampling.seed, self._sampling.step, prompts[:, None], samples[:, None]

    def _tensor(self, values: list[int]) -> Int64[Tensor, " rows"]:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
