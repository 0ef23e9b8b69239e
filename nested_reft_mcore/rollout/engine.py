"""What generates completions: slots, memory and options around a generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.rollout.completion import Completion, Detokenize, StopRule
from nested_reft_mcore.rollout.decode_model import DecodeModel
from nested_reft_mcore.rollout.draft_length import DraftLength
from nested_reft_mcore.rollout.drawing import Drawing
from nested_reft_mcore.rollout.generation import Generation
from nested_reft_mcore.rollout.memory import check_one_fits, choose_num_slots
from nested_reft_mcore.rollout.scheduler import Batching, Scheduler
from nested_reft_mcore.rollout.types import (
    Prompt,
    RolloutBatch,
    RolloutStats,
    SamplingParams,
)


class RolloutEngine:
    """Generates completions with whatever policy it is handed."""

    def __init__(
        self,
        max_slots: int | None = None,
        *,
        kv_cache_bytes: int | None = None,
        max_num_batched_tokens: int = 2048,
        batching: Batching = "continuous",
        max_draft_tokens: int = 8,
    ) -> None:
        """Results don't depend on any of these, but for draws within rounding of a boundary.

        Args:
            max_slots: Sequences that are decoded at the same time, at most, over all slot groups.
            kv_cache_bytes: Memory of a process for keys and values; half of what is free if absent.
            max_num_batched_tokens: Tokens of a slot group's pass; longer prompts run in pieces.
            batching: Whether a finished sequence's slot goes to the next one at once.
            max_draft_tokens: Longest draft of lossless mode.
        """
        for name, value in (
            ("max_slots", max_slots),
            ("kv_cache_bytes", kv_cache_bytes),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_draft_tokens", max_draft_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self.max_slots = max_slots
        self.kv_cache_bytes = kv_cache_bytes
        self.max_num_batched_tokens = max_num_batched_tokens
        self.batching: Batching = batching
        self.max_draft_tokens = max_draft_tokens

    def check_room(self, model: DecodeModel, plan: LayerSkipPlan, length: int) -> None:
        """Raise UserError, on every process of the model, unless a sequence of `length` fits."""
        check_one_fits(model, plan, length, self.kv_cache_bytes)

    def generate(
        self,
        model: DecodeModel,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        plan: LayerSkipPlan,
        *,
        draft_plan: LayerSkipPlan | None = None,
        first_prompt_index: int = 0,
        prompt_indices: Sequence[int] | None = None,
        on_finished: Callable[[Completion], None] | None = None,
        detokenize: Detokenize | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> RolloutBatch:
        """Complete each prompt `num_samples` times; the same result on every rank of the model.

        All processes of the tensor and pipeline groups call it with the same arguments. `plan` must
        be the policy's plan of the moment. `first_prompt_index` is the first prompt's place in the
        step's global batch: it keys the random numbers, so that replicas with a part of the prompts
        each draw what one replica with all of them would. `prompt_indices` gives the place of each
        prompt instead, where they are not in a row.

        `on_finished` gets each completion, token ids without log-probs, as soon as it ends; on
        every process, in the order of the process's own rounds.

        With `draft_plan` the policy under that plan proposes tokens, and under `plan` it verifies
        them (self-speculation, arXiv 2211.17192): the completions follow `plan`'s distribution
        exactly, but which ones are drawn depends on the lengths of drafts.

        `interrupted` is asked every few tokens, on all processes of the model in the same round, so
        it may communicate among them; it has to give the same answer on all. True abandons the
        generation on all of them: nothing is left under way, and GenerationInterrupted is raised.

        Raises ValueError for another plan, an empty prompt or one that leaves no room for its
        response, stop strings without `detokenize`; UserError where the keys and values of not one
        sequence fit.
        """
        rule = StopRule(sampling, detokenize)
        if prompt_indices is None:
            prompt_indices = range(first_prompt_index, first_prompt_index + len(prompts))
        _check(model, prompts, num_samples, rule, plan)
        if not prompts:
            return RolloutBatch((), num_samples, plan, RolloutStats(0, 0.0))
        started = time.perf_counter()
        most_drafted = 0 if draft_plan is None else self.max_draft_tokens
        length = max(len(p.token_ids) + rule.limit(p) for p in prompts) - 1 + most_drafted
        num_sequences = len(prompts) * num_samples
        num_slots = choose_num_slots(
            model, plan, length, num_sequences, self.max_slots, self.kv_cache_bytes
        )
        draft_length = _draft_length(plan, draft_plan, most_drafted)
        scheduler = self._scheduler(rule, model, num_slots, draft_length, on_finished)
        scheduler.submit(prompts, num_samples)
        with torch.inference_mode():
            generation = Generation(
                model,
                model.new_cache(plan, num_slots, length),
                scheduler,
                Drawing(
                    model,
                    sampling,
                    num_sequences=num_sequences,
                    num_slots=num_slots,
                    most_drafted=most_drafted,
                    prompt_indices=prompt_indices,
                ),
                plan,
                draft_plan or plan,
            )
            generation.run(interrupted)
            rollouts = generation.rollouts(prompts, prompt_indices, detokenize)
            stats = generation.stats(num_slots, time.perf_counter() - started)
        return RolloutBatch(rollouts, num_samples, plan, stats)

    def _scheduler(
        self,
        rule: StopRule,
        model: DecodeModel,
        num_slots: int,
        draft_length: DraftLength | None,
        on_finished: Callable[[Completion], None] | None,
    ) -> Scheduler:
        return Scheduler(
            rule,
            num_slots=num_slots,
            num_lanes=model.link.num_stages,
            max_num_batched_tokens=self.max_num_batched_tokens,
            batching=self.batching,
            draft_length=draft_length,
            on_finished=on_finished,
        )


def _draft_length(
    plan: LayerSkipPlan, draft_plan: LayerSkipPlan | None, most_drafted: int
) -> DraftLength | None:
    if draft_plan is None:
        return None
    cost = (1.0 - draft_plan.skip_ratio) / max(1.0 - plan.skip_ratio, 1e-9)
    return DraftLength(most_drafted, min(1.0, cost))


def _check(
    model: DecodeModel,
    prompts: Sequence[Prompt],
    num_samples: int,
    rule: StopRule,
    plan: LayerSkipPlan,
) -> None:
    if model.plan != plan:
        raise ValueError(
            f"asked to generate under plan {plan.describe()}, but the policy skips "
            f"{model.plan.describe()}"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, found {num_samples}")
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(f"prompt {prompt.source or prompt.text!r} has no tokens")
        if rule.limit(prompt) < 1:
            raise ValueError(
                f"prompt {prompt.source or prompt.text!r}: max_new_tokens must be at least 1, "
                f"found {prompt.max_new_tokens}"
            )
        if len(prompt.token_ids) + rule.limit(prompt) > model.max_length:
            raise ValueError(
                f"prompt {prompt.source or prompt.text[:40]!r} has {len(prompt.token_ids)} tokens; "
                f"with max_new_tokens {rule.limit(prompt)} that is more than the model's "
                f"{model.max_length} positions"
            )
