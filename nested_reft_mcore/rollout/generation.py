"""A generation under way on one process, several slot groups in flight over the pipeline.

Work is a sequence of items (round, chunk, lane). A lane carries one slot group; in each round the
group passes through every chunk of every stage, and each of its rows gains a token (or a draft of
one, or the tokens that verification keeps). Each process handles its items in lexicographic order,
receives what an item needs just before it and sends what comes out without waiting. Every item
depends on an earlier one, or on the same one of an earlier stage, so nothing can block for ever.

Who is done follows from the sampled tokens alone. The last stage samples them and sends them to the
first, which passes them on with the next round, so no stage ever asks another what to do next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Generic

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.rollout.completion import Completion, Detokenize
from nested_reft_mcore.rollout.decode_model import Cache, DecodeModel
from nested_reft_mcore.rollout.drawing import Drawing
from nested_reft_mcore.rollout.pipeline_link import Sending
from nested_reft_mcore.rollout.scheduler import Lane, Scheduler, Step
from nested_reft_mcore.rollout.token_pass import TokenPass
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutStats, RolloutTimings

ROUNDS_BETWEEN_QUESTIONS = 4
"""Rounds, a decoded token each, after which a generation asks again whether to go on."""


class GenerationInterrupted(Exception):
    """A generation was abandoned because it was asked to."""


class _LaneTraffic:
    """What a lane has under way on this process."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.step: Step | None = None
        """What the lane did last, until its tokens are counted."""
        self.tokens: TokenPass | None = None
        """The same for the model."""
        self.sampled: Tensor | None = None
        """Tokens that the last stage has sampled and not yet counted, `[rows, width]`."""
        self.sendings: list[Sending] = []

    def complete_sendings(self) -> None:
        """Forget messages of earlier rounds; the lane's next arrival shows that they were read."""
        for sending in self.sendings:
            sending.wait()
        self.sendings = []


class Generation(Generic[Cache]):
    """One call of `generate` on one process."""

    def __init__(
        self,
        model: DecodeModel[Cache],
        cache: Cache,
        scheduler: Scheduler,
        drawing: Drawing,
        plan: LayerSkipPlan,
        draft_plan: LayerSkipPlan,
    ) -> None:
        self._model = model
        self._link = model.link
        self._cache = cache
        self._scheduler = scheduler
        self._drawing = drawing
        self._plan = plan
        self._draft_plan = draft_plan
        self._lanes = [_LaneTraffic(lane) for lane in scheduler.lanes]
        self._started = time.perf_counter()

    def run(self, interrupted: Callable[[], bool] | None) -> None:
        """Generate everything, or raise GenerationInterrupted.

        Rounds have the same number on every process of the model, so the top of the loop is the
        place where processes may agree to stop early.
        """
        self._model.begin()
        self._link.waited_seconds = 0.0
        num_rounds = 0
        while not self._scheduler.is_done:
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
            if lane.step is not None:
                self._learn_tokens(lane, lane.step)
        for lane in self._lanes:
            lane.complete_sendings()
        raise GenerationInterrupted

    def rollouts(
        self,
        prompts: Sequence[Prompt],
        prompt_indices: Sequence[int],
        detokenize: Detokenize | None,
    ) -> tuple[Rollout, ...]:
        """Every completion with its record; the last stage tells the others its part of it."""
        completions = self._scheduler.completions
        logprobs = self._drawing.logprobs
        times = torch.tensor(
            [(c.first_token_at, c.finished_at) for c in completions],
            dtype=torch.float64,
            device=self._model.device,
        )
        self._link.broadcast_from_last(logprobs)
        self._link.broadcast_from_last(times)

        def rollout(completion: Completion, row: list[float], when: list[float]) -> Rollout:
            assert completion.finish_reason is not None, "generation ended before its completions"
            token_ids = tuple(completion.token_ids)
            return Rollout(
                prompt=prompts[completion.prompt],
                prompt_index=prompt_indices[completion.prompt],
                sample_index=completion.sample,
                token_ids=token_ids,
                behavior_logprobs=tuple(row[: len(token_ids)]),
                finish_reason=completion.finish_reason,
                text=detokenize(token_ids) if detokenize else "",
                timings=RolloutTimings(*when),
            )

        rows = zip(completions, logprobs.tolist(), times.tolist(), strict=True)
        return tuple(rollout(*row) for row in rows)

    def stats(self, num_slots: int, seconds: float) -> RolloutStats:
        """What it cost, the same on every process of the pipeline."""
        counts = self._model.executions()
        self._link.sum_over_stages(counts)
        attention, mlp = counts.tolist()
        by_stage = torch.zeros(3, self._link.num_stages, dtype=torch.float64)
        by_stage[:, self._link.rank] = torch.tensor(
            [self._link.waited_seconds / seconds, self._cache.num_bytes, seconds]
        )
        by_stage = by_stage.to(self._model.device)
        self._link.sum_over_stages(by_stage)
        waiting, kv_bytes, all_seconds = by_stage.tolist()
        scheduler = self._scheduler
        return RolloutStats(
            generated_tokens=sum(len(c.token_ids) for c in scheduler.completions),
            seconds=all_seconds[-1],
            attention_executions=tuple(attention),
            mlp_executions=tuple(mlp),
            stage_of_layer=self._model.stage_of_layer,
            num_slots=num_slots,
            kv_cache_bytes=tuple(int(number) for number in kv_bytes),
            waiting_shares=tuple(waiting),
            prefilled_tokens=scheduler.prefilled_tokens,
            decoded_tokens=scheduler.decoded_tokens,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_tokens=scheduler.accepted_tokens,
            draft_skip_ratio=self._draft_plan.skip_ratio if self._draft_plan != self._plan else 0.0,
        )

    def _advance(self, traffic: _LaneTraffic) -> None:
        """Count the last round's tokens, and see what the lane does in this one."""
        if traffic.step is not None:
            tokens = self._learn_tokens(traffic, traffic.step)
            now = time.perf_counter() - self._started
            broken = self._scheduler.accept(traffic.lane, traffic.step, tokens, now)
            if broken:
                self._cache.clear(broken)
        traffic.step = self._scheduler.next_step(traffic.lane)
        traffic.tokens = None
        if traffic.step is not None:
            traffic.tokens = self._token_pass(traffic.step)

    def _token_pass(self, step: Step) -> TokenPass:
        """The step as tensors."""
        device = self._model.device
        starts = [row.position + (len(row.drafts) if step.is_draft else 0) for row in step.rows]
        return TokenPass(
            slots=torch.tensor([row.slot for row in step.rows], dtype=torch.int64, device=device),
            positions=torch.tensor(starts, dtype=torch.int64, device=device),
            width=step.width,
            span=max(starts, default=-step.width) + step.width,
            pieces=tuple(step.pieces),
            copies=tuple(step.copies),
        )

    def _learn_tokens(self, traffic: _LaneTraffic, step: Step) -> list[list[int]]:
        """What was sampled last round: the last stage knows, the others hear it and pass it on."""
        if not step.rows:
            return []
        if self._link.is_last:
            assert traffic.sampled is not None, "the lane's rows were not sampled last round"
            return traffic.sampled.tolist()
        tokens = self._link.receive_previous(
            (len(step.rows), step.width), torch.int64, self._model.device
        )
        traffic.complete_sendings()
        if self._link.rank + 1 < self._link.num_stages - 1:
            traffic.sendings.append(self._link.send_next(tokens))
        return tokens.tolist()

    def _pass_chunk(self, traffic: _LaneTraffic, chunk: int) -> None:
        """Take the lane's tokens through one chunk of this stage."""
        step, tokens = traffic.step, traffic.tokens
        if step is None or tokens is None:
            return
        inputs = self._inputs(traffic, step, tokens, chunk)
        plan = self._draft_plan if step.is_draft else self._plan
        output = self._model.forward(chunk, inputs, tokens, self._cache, plan)
        if not (self._link.is_last and chunk == self._model.num_chunks - 1):
            traffic.sendings.append(self._link.send_next(output))
        elif step.rows:
            traffic.sampled = self._drawing.draw(step, output)
            if self._link.num_stages > 1:
                traffic.sendings.append(self._link.send_next(traffic.sampled))

    def _inputs(self, traffic: _LaneTraffic, step: Step, tokens: TokenPass, chunk: int) -> Tensor:
        """Token ids for the very first chunk, hidden states of the previous chunk for others."""
        if self._link.is_first and chunk == 0:
            return torch.tensor(
                [*step.row_tokens(), *step.piece_tokens],
                dtype=torch.int64,
                device=self._model.device,
            )
        hidden = self._link.receive_previous(
            self._model.hidden_shape(tokens.num_tokens), self._model.dtype, self._model.device
        )
        if self._link.is_last and chunk == 0:
            traffic.complete_sendings()
        return hidden
