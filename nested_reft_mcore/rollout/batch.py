"""Rollouts as the tensors of an update, aligned with `labels` (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from nested_reft_mcore.data.collation import lay_out
from nested_reft_mcore.rollout.types import Rollout


@dataclass(frozen=True)
class TrainingBatch:
    """Sequences to learn from; row b, place t speaks of `labels[b, t]` given `tokens[b, :t+1]`."""

    tokens: Int64[Tensor, "batch seq"]
    """Prompt and response without the last token, right-padded."""
    labels: Int64[Tensor, "batch seq"]
    """Prompt and response without the first token, right-padded."""
    position_ids: Int64[Tensor, "batch seq"]
    """0, 1, 2, ... in every row."""
    response_mask: Bool[Tensor, "batch seq"]
    """True where the label was sampled by the policy."""
    behavior_logprobs: Float32[Tensor, "batch seq"]
    """Nats, of the policy that generated; 0 outside the mask."""
    advantages: Float32[Tensor, " batch"]
    """One per sequence."""
    old_logprobs: Float32[Tensor, "batch seq"] | None = None
    """Nats, of the target policy before the step's first update."""
    ref_logprobs: Float32[Tensor, "batch seq"] | None = None
    """Nats, of the reference policy."""

    def __len__(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def num_response_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int(self.response_mask.sum())

    @classmethod
    def from_rollouts(
        cls,
        rollouts: Sequence[Rollout],
        advantages: Float[Tensor, " batch"],
        pad_token_id: int,
        pad_to_multiple: int = 1,
        length: int | None = None,
    ) -> TrainingBatch:
        """Lay out `rollouts` as rows, in order.

        `length` fixes `seq`; left out, it is the longest row rounded up to `pad_to_multiple`.
        Raises ValueError for an empty batch or prompt, advantages of another number, and rows
        that don't fit.
        """
        if not rollouts:
            raise ValueError("no rollouts to make a batch of")
        if advantages.shape != (len(rollouts),):
            raise ValueError(f"{len(rollouts)} rollouts but advantages {tuple(advantages.shape)}")
        if any(not rollout.prompt.token_ids for rollout in rollouts):
            raise ValueError("a rollout has an empty prompt: its first token has no context")
        pairs = [(rollout.prompt.token_ids, rollout.token_ids) for rollout in rollouts]
        rows = lay_out(pairs, pad_token_id, pad_to_multiple, length)
        behavior_logprobs = torch.zeros(rows.tokens.shape, dtype=torch.float32)
        for row, rollout in enumerate(rollouts):
            start = len(rollout.prompt.token_ids) - 1
            response = slice(start, start + len(rollout.token_ids))
            behavior_logprobs[row, response] = torch.tensor(rollout.behavior_logprobs)
        return cls(
            *rows,
            behavior_logprobs=behavior_logprobs,
            advantages=advantages.detach().to("cpu", torch.float32),
        )

    def with_advantages(self, advantages: Float[Tensor, " batch"]) -> TrainingBatch:
        """The same batch with these advantages; ValueError for another number of them."""
        if advantages.shape != (len(self),):
            raise ValueError(f"{len(self)} sequences but advantages {tuple(advantages.shape)}")
        return replace(self, advantages=advantages.detach().to(self.tokens.device, torch.float32))

    def with_old_logprobs(self, old_logprobs: Float[Tensor, "batch seq"]) -> TrainingBatch:
        """The same batch with the target policy's log-probs; ValueError for another shape."""
        return replace(self, old_logprobs=self._aligned("old_logprobs", old_logprobs))

    def with_ref_logprobs(self, ref_logprobs: Float[Tensor, "batch seq"]) -> TrainingBatch:
        """The same batch with the reference's log-probs; ValueError for another shape."""
        return replace(self, ref_logprobs=self._aligned("ref_logprobs", ref_logprobs))

    def without_responses(self, rows: Bool[Tensor, " batch"]) -> TrainingBatch:
        """The same batch in which the responses of these rows count for nothing."""
        return replace(self, response_mask=self.response_mask & ~rows[:, None])

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The same batch on another device."""
        return self._map(lambda _, column: column.to(device, non_blocking=True))

    def split(self, n: int) -> tuple[TrainingBatch, ...]:
        """`n` mini-batches of whole sequences in order, their sizes at most one apart."""
        if not 1 <= n <= len(self):
            raise ValueError(f"cannot split {len(self)} sequences into {n} mini-batches")
        sizes = [len(self) // n + (i < len(self) % n) for i in range(n)]
        starts = [sum(sizes[:i]) for i in range(n)]
        return tuple(
            self._rows(start, start + size) for start, size in zip(starts, sizes, strict=True)
        )

    def deal(self, n: int) -> tuple[TrainingBatch, ...]:
        """`n` mini-batches of one size, row r into mini-batch r modulo n.

        Where every data-parallel replica has a multiple of `n` rows, a row's mini-batch does not
        depend on the number of replicas. Raises ValueError where `n` does not divide the rows.
        """
        if n < 1 or len(self) % n:
            raise ValueError(f"cannot deal {len(self)} sequences into {n} equal mini-batches")
        return tuple(self._map(lambda _, column, i=i: column[i::n]) for i in range(n))

    def micro_batches(self, micro_batch_size: int) -> tuple[TrainingBatch, ...]:
        """Batches of exactly `micro_batch_size` rows, the last one filled up with masked rows.

        Pipeline schedules want one shape; a row whose mask is all false counts for nothing.
        """
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, found {micro_batch_size}")
        padded = self._pad_rows(-len(self) % micro_batch_size)
        return tuple(
            padded._rows(start, start + micro_batch_size)
            for start in range(0, len(padded), micro_batch_size)
        )

    def lengths(self) -> list[int]:
        """Places of each row up to the last one that counts; 1 where none does."""
        places = torch.arange(1, self.response_mask.shape[1] + 1, device=self.response_mask.device)
        return (self.response_mask * places).amax(dim=1).clamp_(min=1).tolist()

    def take(self, rows: Sequence[int], length: int) -> TrainingBatch:
        """These rows in this order, cut after `length` places, or padded with places that count
        for nothing."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        missing = max(0, length - self.tokens.shape[1])

        def cut(name: str, column: Tensor) -> Tensor:
            column = column[chosen]
            if column.dim() == 1:
                return column
            if name == "position_ids":
                return torch.arange(length, device=column.device).expand(len(rows), -1)
            return torch.nn.functional.pad(column[:, :length], (0, missing))

        return self._map(cut)

    @classmethod
    def concatenate(cls, batches: Sequence[TrainingBatch]) -> TrainingBatch:
        """All rows in order, as wide as the widest batch."""
        width = max(batch.tokens.shape[1] for batch in batches)
        wide = [batch.take(range(len(batch)), width) for batch in batches]
        return wide[0]._map(lambda name, _: torch.cat([getattr(batch, name) for batch in wide]))

    def _aligned(self, name: str, logprobs: Tensor) -> Tensor:
        """Log-probs that belong to this batch, in its type and on its device, without gradient."""
        if logprobs.shape != self.tokens.shape:
            raise ValueError(
                f"{name} {tuple(logprobs.shape)} for tokens {tuple(self.tokens.shape)}"
            )
        return logprobs.detach().float().to(self.tokens.device)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> TrainingBatch:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: change(name, col) for name, col in columns.items() if col is not None}
        )

    def _rows(self, start: int, stop: int) -> TrainingBatch:
        return self._map(lambda _, column: column[start:stop])

    def _pad_rows(self, num_rows: int) -> TrainingBatch:
        def pad(name: str, column: Tensor) -> Tensor:
            if name == "position_ids":
                return torch.cat([column, column[:1].expand(num_rows, -1)])
            # Token 0 exists in every vocabulary; false and 0.0 are what masked places hold.
            return torch.cat([column, column.new_zeros(num_rows, *column.shape[1:])])

        return self._map(pad) if num_rows else self
