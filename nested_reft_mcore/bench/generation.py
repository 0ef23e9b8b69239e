"""One timed generation: fixed random prompts, a fixed number of tokens, one plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.mcore.agreement import barrier
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.engine import ROUNDS_BETWEEN_QUESTIONS, RolloutEngine
from nested_reft_mcore.rollout.types import Prompt, SamplingParams


@dataclass(frozen=True)
class Workload:
    """What is generated: every sequence gets exactly `new_tokens` tokens."""

    num_prompts: int
    num_samples: int
    prompt_tokens: int
    new_tokens: int

    @property
    def num_sequences(self) -> int:
        """Completions."""
        return self.num_prompts * self.num_samples

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return self.num_sequences * self.new_tokens

    def describe(self) -> str:
        """Such as `16 x 64 + 64`; samples of one prompt are written as `1 (8 samples)`."""
        samples = f" ({self.num_samples} samples)" if self.num_samples > 1 else ""
        return f"{self.num_prompts}{samples} x {self.prompt_tokens} + {self.new_tokens}"

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """The prompts' token ids, the same on every process."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_prompts, self.prompt_tokens)
        return torch.randint(vocab_size, shape, generator=generator).tolist()


@dataclass(frozen=True)
class Timing:
    """What one generation took."""

    seconds: float
    """Wall-clock time, prefill included."""
    step_seconds: float | None
    """Time of one token of all sequences, once all are prefilled; None where too few were seen."""
    waiting_shares: tuple[float, ...]
    """By stage, the share of the time spent waiting for another one."""
    kv_cache_bytes: tuple[int, ...]
    """By stage, what the caches took."""
    num_slots: int
    """Sequences that there was room for."""
    prefilled_tokens: int
    """Prompt tokens that went through the model."""


class Generator:
    """Generates with a policy as often as asked, and tells the time."""

    def __init__(self, policy: Policy, max_slots: int = 64, **engine_options: Any) -> None:
        """`max_slots`: sequences that are decoded together."""
        self._policy = policy
        self._decoder = PolicyDecoder(policy)
        self._engine = RolloutEngine(max_slots, **engine_options)

    def run(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        new_tokens: int,
        plan: LayerSkipPlan,
        seed: int = 0,
    ) -> Timing:
        """Generate at temperature 1 with no stop token. Every process of the policy calls it."""
        marks: list[float] = []

        def mark() -> bool:
            # Asked every few tokens, hence a clock of decoding alone.
            marks.append(time.perf_counter())
            return False

        sampling = SamplingParams(max_new_tokens=new_tokens, seed=seed)
        barrier()
        started = time.perf_counter()
        with self._policy.nested(plan):
            batch = self._engine.generate(
                self._decoder, prompts, num_samples, sampling, plan, interrupted=mark
            )
        seconds = time.perf_counter() - started
        stats: Any = batch.stats
        return Timing(
            seconds=seconds,
            step_seconds=_step_seconds(marks),
            waiting_shares=getattr(stats, "waiting_shares", ()),
            kv_cache_bytes=getattr(stats, "kv_cache_bytes", ()),
            num_slots=getattr(stats, "num_slots", 0),
            prefilled_tokens=getattr(stats, "prefilled_tokens", 0),
        )


def as_prompts(token_ids: Sequence[Sequence[int]]) -> list[Prompt]:
    """Prompts without text."""
    return [Prompt(tuple(ids), "") for ids in token_ids]


def _step_seconds(marks: Sequence[float]) -> float | None:
    """The median between two marks, for one token."""
    gaps = [later - earlier for earlier, later in pairwise(marks)]
    return statistics.median(gaps) / ROUNDS_BETWEEN_QUESTIONS if gaps else None
