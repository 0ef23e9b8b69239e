"""Speculation with models that are tables: next-token logits given the last token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sampling_cases import numbers, truncated
from torch import Tensor
from torch.distributed import ProcessGroup

from nested_reft_mcore.rollout.sampling import NO_TOKEN
from nested_reft_mcore.rollout.speculation import Proposal, propose, verify
from nested_reft_mcore.rollout.types import SamplingParams


@dataclass(frozen=True)
class Tables:
    """Logits `[vocab + 1, vocab]` of a full and of a drafting model; the last row is the start's.

    `start` and `stop` cut out the columns that this rank holds.
    """

    full: Tensor
    draft: Tensor
    start: int = 0
    stop: int | None = None
    group: ProcessGroup | None = None

    @property
    def vocab_size(self) -> int:
        return self.full.shape[1]

    @property
    def place(self) -> dict:
        return {"vocab_start": self.start, "vocab_size": self.vocab_size, "group": self.group}

    def laws(self, params: SamplingParams) -> tuple[Tensor, Tensor]:
        """`[vocab + 1, vocab]` float64: p and q by definition."""
        return tuple(
            torch.stack([truncated(row, params) for row in table])
            for table in (self.full, self.draft)
        )


def random_tables(vocab_size: int, seed: int, **keywords) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    full, draft = torch.randn(2, vocab_size + 1, vocab_size, generator=generator)
    return Tables(full * 1.5, (0.4 * full + draft) * 1.2, **keywords)


def speculate(
    tables: Tables, last: Tensor, num_drafts: int, params: SamplingParams, key: int
) -> tuple[Tensor, Tensor, list[Proposal]]:
    """One round for rows whose last tokens are given (`vocab_size` stands for the start)."""
    columns = slice(tables.start, tables.stop)
    contexts, proposals = [last], []
    for place in range(num_drafts):
        keys = numbers(len(last), key, 0, place)
        logits = tables.draft[contexts[-1], columns]
        proposals.append(propose(logits, keys, params, **tables.place))
        contexts.append(proposals[-1].tokens)
    uniforms = torch.stack(
        [
            torch.stack([numbers(len(last), key, kind, place) for place in range(num_drafts + 1)])
            for kind in (1, 2)
        ]
    ).permute(2, 1, 0)
    logits = tables.full[torch.stack(contexts, dim=1)][:, :, columns]
    tokens, logprobs = verify(logits, proposals, uniforms, params, **tables.place)
    return tokens, logprobs, proposals


def generate(
    tables: Tables, num_rows: int, num_tokens: int, num_drafts: int, params: SamplingParams, key=0
) -> tuple[Tensor, Tensor]:
    """`[rows, num_tokens]` tokens and log-probs, by as many rounds as the slowest row takes."""
    tokens = torch.full((num_rows, num_tokens + 1), NO_TOKEN)
    tokens[:, 0] = tables.vocab_size
    logprobs = torch.zeros(num_rows, num_tokens + 1)
    length = torch.ones(num_rows, dtype=torch.int64)
    rows = torch.arange(num_rows)
    for number in range(num_tokens):
        last = tokens[rows, length - 1]
        found, found_logprobs, _ = speculate(tables, last, num_drafts, params, key + number)
        for place in range(num_drafts + 1):
            fits = (found[:, place] != NO_TOKEN) & (length <= num_tokens)
            tokens[rows[fits], length[fits]] = found[fits, place]
            logprobs[rows[fits], length[fits]] = found_logprobs[fits, place]
            length += fits
    assert (length == num_tokens + 1).all()
    return tokens[:, 1:], logprobs[:, 1:]


def total_variation(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum()) / 2
