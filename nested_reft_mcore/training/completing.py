"""Completions of many prompts, chunk by chunk, as the lines that `generate` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.inference import GenerateOptions
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.observability.progress import Progress
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.memory import MOST_SLOTS
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutStats, SamplingParams
from nested_reft_mcore.training.chunks import cut, gather_on_main, json_numbers, my_part
from nested_reft_mcore.training.replicas import is_replica_writer
from nested_reft_mcore.training.sampling import cache_bytes

_SEQUENCES_PER_SLOT = 4
"""In a chunk: enough to keep the slots busy, few enough to hold."""


@dataclass
class GenerationTotals:
    """What the chunks so far cost, over all replicas; complete on rank 0 alone."""

    num_prompts: int = 0
    num_completions: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Replicas work side by side: the slowest one's time."""
    speculates: bool = False
    num_drafted: int = 0
    num_accepted: int = 0
    layer_executions: list[float] = field(default_factory=list)
    """For each pipeline rank."""

    def add(self, replicas: Sequence[RolloutStats]) -> None:
        """Count a chunk."""
        self.num_tokens += sum(stats.generated_tokens for stats in replicas)
        self.num_drafted += sum(stats.drafted_tokens for stats in replicas)
        self.num_accepted += sum(stats.accepted_tokens for stats in replicas)
        self.seconds += max(stats.seconds for stats in replicas)
        counts = [self.layer_executions, *(stats.layer_executions for stats in replicas)]
        self.layer_executions = [sum(stage) for stage in zip(*filter(None, counts), strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of generation."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def describe(self) -> str:
        """One line for people."""
        executions = ", ".join(
            f"{count:,.1f}".removesuffix(".0") + f" on stage {stage}"
            for stage, count in enumerate(self.layer_executions)
        )
        return (
            f"{self.num_completions} completions, {self.num_tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens_per_second:,.0f} tokens/s); passes through a layer: {executions}"
            + self._describe_drafts()
        )

    def _describe_drafts(self) -> str:
        if not self.speculates:
            return ""
        if not self.num_drafted:
            return "; nothing was drafted: with so few layers skipped it would not have paid"
        share = self.num_accepted / self.num_drafted
        return f"; {self.num_accepted} of {self.num_drafted} drafted tokens accepted ({share:.0%})"


def completed_lines(
    policy: Policy,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    sampling: SamplingParams,
    plan: LayerSkipPlan,
    tokenizer: Tokenizer,
    totals: GenerationTotals,
) -> Iterator[Mapping[str, Any]]:
    """Output lines, in input order on rank 0 and none elsewhere; every process has to run it."""
    context = policy.context
    engine = RolloutEngine(options.max_slots, kv_cache_bytes=cache_bytes(options))
    decoder = PolicyDecoder(policy)
    sequences = (options.max_slots or MOST_SLOTS) * _SEQUENCES_PER_SLOT
    prompts_per_replica = max(1, sequences // options.num_samples)
    needs_text = bool(options.stop_strings) or is_replica_writer(context)
    draft_plan = None
    totals.speculates = options.speculative
    if options.speculative:
        plan, draft_plan = LayerSkipPlan.full(plan.num_layers), plan
    skipped = (draft_plan or plan).describe() if (draft_plan or plan).skipped else None
    progress = Progress("auto" if context.is_main else "off", len(prompts), title="generate")
    with policy.nested(plan), progress:
        for chunk in cut(len(prompts), prompts_per_replica * context.data.size):
            shard = my_part(chunk, context)
            batch = engine.generate(
                decoder,
                prompts[shard.start : shard.stop],
                options.num_samples,
                sampling,
                plan,
                draft_plan=draft_plan,
                first_prompt_index=shard.start,
                # Stop strings are looked for on every process, text is written by one.
                detokenize=tokenizer.decode if needs_text else None,
            )
            replicas = gather_on_main(batch, context)
            if not replicas:
                continue
            for replica in replicas:
                for rollout in replica.rollouts:
                    yield _completion_line(rollout, with_logprobs=options.logprobs)
            totals.add([replica.stats for replica in replicas])
            totals.num_prompts += len(chunk)
            totals.num_completions += len(chunk) * options.num_samples
            metrics = {"perf/throughput": totals.tokens_per_second}
            progress.update(totals.num_prompts, metrics, skipped=skipped)


def _completion_line(rollout: Rollout, *, with_logprobs: bool) -> Mapping[str, Any]:
    line: dict[str, Any] = {
        "prompt_index": rollout.prompt_index,
        "sample_index": rollout.sample_index,
        "prompt_token_ids": rollout.prompt.token_ids,
        "token_ids": rollout.token_ids,
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
    }
    if with_logprobs:
        line["logprobs"] = json_numbers(rollout.behavior_logprobs, rollout.prompt.source)
    return line
