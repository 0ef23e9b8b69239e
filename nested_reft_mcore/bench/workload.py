"""What is generated, and what one generation took."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
