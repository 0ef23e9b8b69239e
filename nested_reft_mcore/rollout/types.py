"""What generation takes and gives: prompts, sampling parameters, completions with their record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.data.prompt import Prompt

__all__ = [
    "FinishReason",
    "Prompt",
    "Rollout",
    "RolloutBatch",
    "RolloutStats",
    "RolloutTimings",
    "SamplingParams",
]

FinishReason = Literal["stop", "length", "nan"]
"""`stop`: the last token is a stop token, or ends a stop string; `length`: `max_new_tokens` were
generated without one; `nan`: the next token's logits were no distribution, and the response ends
before it."""


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from the logits, and when a completion ends.

    Raises ValueError where a value makes no distribution.
    """

    max_new_tokens: int
    """Longest response, the stop token included."""
    temperature: float = 1.0
    """Logits are divided by it; also the temperature of the reported log-probabilities."""
    greedy: bool = False
    """Take the likeliest token instead of drawing; the lowest id wins a tie."""
    top_k: int | None = None
    """Keep the k likeliest tokens, and any that tie with the k-th."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens with at least this mass, and any that tie with the last."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; the one that ended it is its last token."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response as soon as it contains one; it is kept."""
    seed: int = 0
    """Key of the uniform numbers, together with `step`, prompt, sample and position."""
    step: int = 0
    """Training step, so that each step draws afresh and a resumed run draws the same."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], found {self.top_p}")
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty: it would end every response")


@dataclass(frozen=True)
class RolloutTimings:
    """Seconds since generation of the batch began, as the last pipeline stage saw them."""

    first_token: float
    """When the response had its first token."""
    finished: float
    """When it had its last one."""


@dataclass(frozen=True)
class Rollout:
    """One completion with its record. Raises ValueError where tokens and log-probs don't match."""

    prompt: Prompt
    prompt_index: int
    """Place of the prompt in the step's global batch, over all data-parallel replicas."""
    sample_index: int
    """Place in the prompt's group, from 0."""
    token_ids: tuple[int, ...]
    """The response, the stop token included."""
    behavior_logprobs: tuple[float, ...]
    """Nats, one per response token, of the distribution really sampled from."""
    finish_reason: FinishReason
    text: str = ""
    """The response as text; empty until somebody with a tokenizer fills it in."""
    timings: RolloutTimings | None = field(default=None, compare=False)
    """Absent where it was not generated here: replayed, or given."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.behavior_logprobs):
            raise ValueError(
                f"{len(self.token_ids)} response tokens but {len(self.behavior_logprobs)} "
                "log-probabilities"
            )

    @property
    def is_truncated(self) -> bool:
        """Whether it was cut off at the longest length instead of ending itself."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class RolloutStats:
    """What generating a batch cost."""

    generated_tokens: int
    """Response tokens of all completions, stop tokens included."""
    seconds: float
    """Wall-clock time, prefill included."""
    attention_executions: tuple[int, ...] = ()
    """For each global layer, how many forward passes ran its attention."""
    mlp_executions: tuple[int, ...] = ()
    """For each global layer, how many forward passes ran its MLP."""
    stage_of_layer: tuple[int, ...] = ()
    """For each global layer, the pipeline rank that holds it."""
    num_slots: int = 0
    """Sequences that had room at the same time."""
    kv_cache_bytes: tuple[int, ...] = ()
    """For each pipeline rank, what one of its tensor-parallel ranks kept of keys and values."""
    waiting_shares: tuple[float, ...] = ()
    """For each pipeline rank, share of the time that it waited for messages of other stages."""
    prefilled_tokens: int = 0
    """Prompt tokens that ran in pieces of prompts; a prompt's last token is decoded, per sample."""
    decoded_tokens: int = 0
    """Tokens that ran in rows: one for each sampled token, and those of finished rows and drafts
    that were thrown away."""
    drafted_tokens: int = 0
    """Tokens that the draft plan proposed."""
    accepted_tokens: int = 0
    """Proposed tokens that verification kept."""
    draft_skip_ratio: float = 0.0
    """Share of the model that the draft plan leaves out."""

    @classmethod
    def total(cls, parts: Sequence[RolloutStats]) -> RolloutStats:
        """Of several generations, one after the other, of the same model."""
        if len(parts) == 1:
            return parts[0]

        def added(name: str) -> tuple[int, ...]:
            return tuple(
                sum(column) for column in zip(*(getattr(p, name) for p in parts), strict=True)
            )

        seconds = sum(part.seconds for part in parts)
        waited = zip(
            *([s * part.seconds for s in part.waiting_shares] for part in parts), strict=True
        )
        return cls(
            generated_tokens=sum(part.generated_tokens for part in parts),
            seconds=seconds,
            attention_executions=added("attention_executions"),
            mlp_executions=added("mlp_executions"),
            stage_of_layer=parts[0].stage_of_layer,
            num_slots=max(part.num_slots for part in parts),
            kv_cache_bytes=tuple(
                max(c) for c in zip(*(part.kv_cache_bytes for part in parts), strict=True)
            ),
            waiting_shares=tuple(sum(column) / seconds for column in waited) if seconds else (),
            prefilled_tokens=sum(part.prefilled_tokens for part in parts),
            decoded_tokens=sum(part.decoded_tokens for part in parts),
            drafted_tokens=sum(part.drafted_tokens for part in parts),
            accepted_tokens=sum(part.accepted_tokens for part in parts),
            draft_skip_ratio=max(part.draft_skip_ratio for part in parts),
        )

    @property
    def accept_rate(self) -> float:
        """Share of drafted tokens that were kept; 0 where none were drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall-clock time; 0 where no time was taken."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def layer_executions(self) -> tuple[float, ...]:
        """For each pipeline rank, layer passes that it ran; one part of a layer is half a pass."""
        totals = [0.0] * (1 + max(self.stage_of_layer, default=-1))
        for layer, stage in enumerate(self.stage_of_layer):
            totals[stage] += 0.5 * (self.attention_executions[layer] + self.mlp_executions[layer])
        return tuple(totals)


@dataclass(frozen=True)
class RolloutBatch:
    """The completions of one step on one data-parallel replica.

    Raises ValueError unless `rollouts` are whole groups, all samples of a prompt side by side.
    """

    rollouts: tuple[Rollout, ...]
    """Prompt by prompt; the `group_size` samples of a prompt in order."""
    group_size: int
    """Completions of each prompt."""
    plan: LayerSkipPlan
    """What the behavior policy skipped."""
    stats: RolloutStats

    def __post_init__(self) -> None:
        if self.group_size < 1 or len(self.rollouts) % self.group_size:
            raise ValueError(
                f"{len(self.rollouts)} rollouts are no whole groups of {self.group_size}"
            )
        for place, rollout in enumerate(self.rollouts):
            first = self.rollouts[place - place % self.group_size]
            if rollout.prompt_index != first.prompt_index:
                raise ValueError(f"rollout {place} belongs to another prompt than its group")
            if rollout.sample_index != place % self.group_size:
                raise ValueError(f"rollout {place} is not sample {place % self.group_size}")

    @property
    def num_prompts(self) -> int:
        """Number of groups."""
        return len(self.rollouts) // self.group_size

    def groups(self) -> tuple[tuple[Rollout, ...], ...]:
        """The rollouts of each prompt."""
        size = self.group_size
        return tuple(self.rollouts[i : i + size] for i in range(0, len(self.rollouts), size))
