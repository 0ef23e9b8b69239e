"""The scheduler under random arrivals, lengths and failures, for a thousand steps at a time."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nested_reft_mcore.rollout.completion import StopRule
from nested_reft_mcore.rollout.draft_length import DraftLength
from nested_reft_mcore.rollout.sampling import NO_TOKEN
from nested_reft_mcore.rollout.scheduler import Scheduler, Step
from nested_reft_mcore.rollout.types import Prompt, SamplingParams

STOP = 0
MOST_DRAFTED = 3


class Arrivals(RuleBasedStateMachine):
    """Lanes take turns, as on a process; what is sampled is whatever Hypothesis likes."""

    @initialize(
        num_slots=st.integers(1, 12),
        num_lanes=st.integers(1, 4),
        batched=st.integers(1, 30),
        speculates=st.booleans(),
    )
    def start(self, num_slots: int, num_lanes: int, batched: int, speculates: bool) -> None:
        self.num_slots = num_slots
        self.scheduler = Scheduler(
            StopRule(SamplingParams(6, stop_token_ids=(STOP,)), None),
            num_slots=num_slots,
            num_lanes=num_lanes,
            max_num_batched_tokens=batched,
            draft_length=DraftLength(MOST_DRAFTED, 0.5) if speculates else None,
        )
        self.batched = batched
        self.under_way: dict[int, Step | None] = {
            lane.number: None for lane in self.scheduler.lanes
        }
        self.next_lane = 0
        self.prompt_tokens = 0
        self.filled: dict[int, tuple[int, ...]] = {}

    @rule(lengths=st.lists(st.integers(1, 25), max_size=3), num_samples=st.integers(1, 5))
    def arrive(self, lengths: list[int], num_samples: int) -> None:
        start = len(self.scheduler.completions)
        prompts = [
            Prompt(tuple(range(start * 100, start * 100 + n)), "", max_new_tokens=1 + n % 6)
            for start, n in enumerate(lengths, start)
        ]
        self.prompt_tokens += sum(n - 1 for n in lengths)
        self.scheduler.submit(prompts, num_samples)

    @rule(data=st.data())
    def turn(self, data: st.DataObject) -> None:
        lane = self.scheduler.lanes[self.next_lane]
        self.next_lane = (self.next_lane + 1) % len(self.scheduler.lanes)
        step = self.under_way[lane.number]
        if step is not None:
            token = st.integers(NO_TOKEN, 5)
            width = 1 if step.is_draft else step.width
            tokens = [
                self._verified(data.draw(st.lists(token, min_size=width, max_size=width)))
                for _ in step.rows
            ]
            broken = self.scheduler.accept(lane, step, tokens, 0.0)
            assert set(broken) <= set(lane.slots)
        step = self.scheduler.next_step(lane)
        self.under_way[lane.number] = step
        if step is not None:
            self.check_step(lane.slots, step)

    @staticmethod
    def _verified(tokens: list[int]) -> list[int]:
        """Nothing follows the first NO_TOKEN."""
        if NO_TOKEN in tokens:
            first = tokens.index(NO_TOKEN)
            return tokens[:first] + [NO_TOKEN] * (len(tokens) - first)
        return tokens

    def check_step(self, slots: range, step: Step) -> None:
        """Pieces continue what their slots hold, copies find it whole, rows have their prefix."""
        num_row_tokens = len(step.rows) * step.width
        assert len(step.piece_tokens) == sum(piece.length for piece in step.pieces)
        assert len(step.piece_tokens) <= max(1, self.batched - num_row_tokens)
        offset = 0
        for piece in step.pieces:
            tokens = tuple(step.piece_tokens[offset : offset + piece.length])
            offset += piece.length
            before = self.filled.get(piece.slot, ()) if piece.start else ()
            assert len(before) == piece.start
            self.filled[piece.slot] = before + tokens
        for copy in step.copies:
            assert copy.source not in copy.targets
            for target in copy.targets:
                assert target in slots
                self.filled[target] = self.filled[copy.source][: copy.length]
        for row in step.rows:
            assert row.slot in slots
            if row.prefix.token_ids:
                assert self.filled[row.slot] == row.prefix.token_ids
            assert row.position == len(row.prefix.token_ids) + len(row.completion.token_ids)
            assert (
                len(row.drafts) == (0 if not step.width - 1 else step.num_drafted) or step.is_draft
            )

    @invariant()
    def every_slot_is_free_or_has_one_row(self) -> None:
        used = Counter(
            slot
            for lane in self.scheduler.lanes
            for slot in [*lane.free, *(row.slot for row in lane.rows)]
        )
        assert used == Counter(range(self.num_slots))
        for lane in self.scheduler.lanes:
            assert all(slot in lane.slots for slot in lane.free)
            assert all(row.completion.finish_reason is None for row in lane.rows)

    def teardown(self) -> None:
        """Whatever arrived gets done, and nothing is left behind."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(100_000):
            if self.scheduler.is_done:
                break
            lane = self.scheduler.lanes[self.next_lane]
            self.next_lane = (self.next_lane + 1) % len(self.scheduler.lanes)
            step = self.under_way[lane.number]
            if step is not None:
                width = 1 if step.is_draft else step.width
                self.scheduler.accept(lane, step, [[1] * width] * len(step.rows), 0.0)
            self.under_way[lane.number] = self.scheduler.next_step(lane)
        assert self.scheduler.is_done, "a completion waits for ever"
        assert all(len(lane.free) == len(lane.slots) for lane in self.scheduler.lanes)
        assert not +self.scheduler._num_awaiting
        assert self.scheduler.prefilled_tokens == self.prompt_tokens
        for completion in self.scheduler.completions:
            length = len(completion.token_ids)
            ended = {
                "length": length == completion.limit,
                "stop": length > 0 and completion.token_ids[-1] == STOP,
                "nan": length < completion.limit,
            }
            assert completion.finish_reason is not None
            assert ended[completion.finish_reason]


TestArrivals = Arrivals.TestCase
TestArrivals.settings = settings(max_examples=8, stateful_step_count=1000, deadline=None)
