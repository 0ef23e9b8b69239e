"""Generation under tensor and pipeline parallelism, several slot groups in flight.

Work is a sequence of items (round, chunk, lane). A lane carries one slot group at a time; in each
round the group passes through every chunk of every stage and gains one token per row. Each process
handles its items in lexicographic order, receives what an item needs just before it and sends what
comes out without waiting. Every dependency points to an earlier item, or to the same item on an
earlier stage, so nothing can block for ever.

Who is done follows from the sampled tokens alone. The last stage samples them and sends them to the
first, which passes them on with the next round, so no stage ever asks another what to do next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.rollout.decode_model import Cache, DecodeModel
from nested_reft_mcore.rollout.pipeline_link import Sending
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.slot_group import Completion, SlotGroup, cut_into_groups
from nested_reft_mcore.rollout.types import (
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutStats,
    SamplingParams,
)

ROUNDS_BETWEEN_QUESTIONS = 4
"""Decoded tokens after which a generation asks again whether to go on."""


class GenerationInterrupted(Exception):
    """A generation was abandoned because it was asked to."""


class RolloutEngine:
    """Generates completions with whatever policy it is handed."""

    def __init__(self, slots_per_group: int) -> None:
        """`slots_per_group`: sequences that one pipeline micro-batch decodes together, at most."""
        if slots_per_group < 1:
            raise ValueError(f"slots_per_group must be at least 1, found {slots_per_group}")
        self.slots_per_group = slots_per_group

    def generate(
        self,
        model: DecodeModel,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        plan: LayerSkipPlan,
        *,
        first_prompt_index: int = 0,
        detokenize: Callable[[tuple[int, ...]], str] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> RolloutBatch:
        """Complete each prompt `num_samples` times; the same result on every rank of the model.

        All processes of the tensor and pipeline groups call it with the same arguments.
        `first_prompt_index` is the first prompt's place in the step's global batch: it keys the
        random numbers, so that replicas with a part of the prompts each draw what one replica with
        all of them would. Results don't depend on `slots_per_group` or the parallel layout, but
        for draws within rounding of a boundary. `plan` must be the policy's plan of the moment.

        `interrupted` is asked every few tokens, on all processes of the model in the same round, so
        it may communicate among them; it has to give the same answer on all. True abandons the
        generation on all of them: nothing is left under way, and GenerationInterrupted is raised.

        Raises ValueError for another plan, an empty prompt or one that leaves no room for
        `max_new_tokens`.
        """
        _check(model, prompts, num_samples, sampling, plan)
        started = time.perf_counter()
        with torch.inference_mode():
            generation = _Generation(
                model, prompts, num_samples, sampling, self.slots_per_group, first_prompt_index
            )
            generation.run(interrupted)
            rollouts = generation.rollouts(detokenize)
            attention, mlp = generation.executions()
            seconds = generation.agreed(time.perf_counter() - started)
        stats = RolloutStats(
            generated_tokens=sum(len(rollout.token_ids) for rollout in rollouts),
            seconds=seconds,
            attention_executions=tuple(attention),
            mlp_executions=tuple(mlp),
            stage_of_layer=model.stage_of_layer,
        )
        return RolloutBatch(rollouts, num_samples, plan, stats)


def _check(
    model: DecodeModel,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: SamplingParams,
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
        if len(prompt.token_ids) + sampling.max_new_tokens > model.max_length:
            raise ValueError(
                f"prompt {prompt.source or prompt.text[:40]!r} has {len(prompt.token_ids)} tokens; "
                f"with max_new_tokens {sampling.max_new_tokens} that is more than the model's "
                f"{model.max_length} positions"
            )


class _Lane(Generic[Cache]):
    """One slot group on its way round the pipeline, and the messages it has under way."""

    def __init__(self) -> None:
        self.group: SlotGroup[Cache] | None = None
        self.sampled: Tensor | None = None
        """Tokens that the last stage has sampled and not yet counted."""
        self.sendings: list[Sending] = []

    def complete_sendings(self) -> None:
        """Forget messages of earlier rounds; the lane's next arrival shows that they were read."""
        for sending in self.sendings:
            sending.wait()
        self.sendings = []


class _Generation(Generic[Cache]):
    """One call of `generate` on one process."""

    def __init__(
        self,
        model: DecodeModel[Cache],
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        slots_per_group: int,
        first_prompt_index: int,
    ) -> None:
        self._model = model
        self._link = model.link
        self._prompts = prompts
        self._sampling = sampling
        self._first_prompt_index = first_prompt_index
        self._completions = [
            Completion(number, *divmod(number, num_samples))
            for number in range(len(prompts) * num_samples)
        ]
        groups = cut_into_groups(len(prompts), num_samples, slots_per_group, model.link.num_stages)
        self._queue = deque(groups)
        self._lanes = [_Lane[Cache]() for _ in range(min(len(groups), model.link.num_stages))]
        self._logprobs = torch.zeros(
            len(self._completions), sampling.max_new_tokens, device=model.device
        )

    def run(self, interrupted: Callable[[], bool] | None) -> None:
        """Generate everything, or raise GenerationInterrupted.

        Rounds have the same number on every process of the model, so the top of the loop is the
        place where processes may agree to stop early.
        """
        self._model.begin()
        num_rounds = 0
        while self._queue or any(lane.group is not None for lane in self._lanes):
            is_time_to_ask = num_rounds > 0 and num_rounds % ROUNDS_BETWEEN_QUESTIONS == 0
            if interrupted is not None and is_time_to_ask and interrupted():
                self._abandon()
            num_rounds += 1
            for lane in self._lanes:
                self._advance(lane)
                self._pass_chunk(lane, 0)
            for chunk in range(1, self._model.num_chunks):
                for lane in self._lanes:
                    self._pass_chunk(lane, chunk)
        for lane in self._lanes:
            lane.complete_sendings()

    def _abandon(self) -> None:
        """Receive what is under way, or later messages would be taken for it; then give up."""
        for lane in self._lanes:
            if lane.group is not None:
                self._learn_tokens(lane, lane.group)
        for lane in self._lanes:
            lane.complete_sendings()
        raise GenerationInterrupted

    def rollouts(self, detokenize: Callable[[tuple[int, ...]], str] | None) -> tuple[Rollout, ...]:
        """Every completion with its record; the last stage tells the others the log-probs."""
        self._link.broadcast_from_last(self._logprobs)
        return tuple(
            self._rollout(completion, tuple(logprobs[: len(completion.token_ids)]), detokenize)
            for completion, logprobs in zip(self._completions, self._logprobs.tolist(), strict=True)
        )

    def executions(self) -> list[list[int]]:
        """Passes of every global layer's attention and MLP, on whichever stage they ran."""
        counts = self._model.executions()
        self._link.sum_over_stages(counts)
        return counts.tolist()

    def agreed(self, number: float) -> float:
        """The last stage's number."""
        value = torch.tensor(number, dtype=torch.float64, device=self._model.device)
        self._link.broadcast_from_last(value)
        return float(value)

    def _rollout(
        self,
        completion: Completion,
        logprobs: tuple[float, ...],
        detokenize: Callable[[tuple[int, ...]], str] | None,
    ) -> Rollout:
        assert completion.finish_reason is not None, "generation ended before its completions"
        token_ids = tuple(completion.token_ids)
        return Rollout(
            prompt=self._prompts[completion.prompt],
            prompt_index=self._first_prompt_index + completion.prompt,
            sample_index=completion.sample,
            token_ids=token_ids,
            behavior_logprobs=logprobs,
            finish_reason=completion.finish_reason,
            text=detokenize(token_ids) if detokenize else "",
        )

    def _advance(self, lane: _Lane[Cache]) -> None:
        """Count the last round's tokens; put the next group on the lane if this one is done."""
        if lane.group is not None:
            tokens = self._learn_tokens(lane, lane.group)
            lane.group.accept(tokens)
            if lane.group.is_done:
                lane.group = None
        if lane.group is None and self._queue:
            numbers = self._queue.popleft()
            lane.group = SlotGroup(
                self._model,
                self._prompts,
                self._completions[numbers.start : numbers.stop],
                self._sampling,
                self._first_prompt_index,
            )

    def _learn_tokens(self, lane: _Lane[Cache], group: SlotGroup[Cache]) -> Tensor:
        """What was sampled last round: the last stage knows, the others hear it and pass it on."""
        if self._link.is_last:
            assert lane.sampled is not None, "the lane's group was not sampled last round"
            return lane.sampled
        tokens = self._link.receive_previous((len(group.rows),), torch.int64, self._model.device)
        lane.complete_sendings()
        if self._link.rank + 1 < self._link.num_stages - 1:
            lane.sendings.append(self._link.send_next(tokens))
        return tokens

    def _pass_chunk(self, lane: _Lane[Cache], chunk: int) -> None:
        """Take the lane's group through one chunk of this stage."""
        group = lane.group
        if group is None:
            return
        inputs = self._inputs(lane, group, chunk)
        if group.is_prefilled:
            output = self._model.decode(
                chunk, inputs, group.positions, group.span, group.is_ragged, group.cache
            )
        else:
            output = self._model.prefill(chunk, inputs, group.prompt_lengths, group.cache)
        if self._link.is_last and chunk == self._model.num_chunks - 1:
            self._sample(lane, group, output)
        else:
            lane.sendings.append(self._link.send_next(output))

    def _inputs(self, lane: _Lane[Cache], group: SlotGroup[Cache], chunk: int) -> Tensor:
        """Token ids for the very first chunk, hidden states of the previous chunk for others."""
        if self._link.is_first and chunk == 0:
            return group.last_tokens[:, None] if group.is_prefilled else group.prompt_tokens
        shape = (len(group.rows), 1) if group.is_prefilled else tuple(group.prompt_tokens.shape)
        hidden = self._link.receive_previous(
            (*shape, self._model.hidden_size), self._model.dtype, self._model.device
        )
        if self._link.is_last and chunk == 0:
            lane.complete_sendings()
        return hidden

    def _sample(self, lane: _Lane[Cache], group: SlotGroup[Cache], logits: Tensor) -> None:
        """Draw a token for each row and tell the first stage."""
        if not group.is_prefilled:
            logits = logits[group.source]
        tokens, logprobs = sample_tokens(
            logits,
            group.uniforms(),
            self._sampling,
            vocab_start=self._model.vocab_start,
            vocab_size=self._model.vocab_size,
            group=self._model.tensor_group,
        )
        self._logprobs[group.sequence_numbers, group.num_generated] = logprobs
        lane.sampled = tokens
        if self._link.num_stages > 1:
            lane.sendings.append(self._link.send_next(tokens))
