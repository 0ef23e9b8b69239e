"""Who decodes where and when: continuous batching over slots, prompts prefilled once per group.

Plain bookkeeping of integers. Every process of the model keeps the same record from the same
sampled tokens, so pipeline stages agree without a word on who is done, who comes next and what a
pass holds.

The slots are dealt out to lanes, one slot group in flight each. All lanes draw from one queue of
completions, prompt by prompt, so the samples of a prompt are admitted one after the other. A
prompt's prefix (all of it but its last token) is written once, into its first sample's slot; later
samples copy it from there, and until they have, the slot goes to nobody else. The last token of a
prompt is decoded by each sample itself, which gives its first logits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nested_reft_mcore.rollout.completion import Completion, StopRule
from nested_reft_mcore.rollout.draft_length import DraftLength
from nested_reft_mcore.rollout.sampling import NO_TOKEN
from nested_reft_mcore.rollout.token_pass import PrefixCopy, PromptPiece
from nested_reft_mcore.rollout.types import Prompt

Batching = Literal["continuous", "static"]
"""`static` fills a lane's slots only when all of its completions are done, and decodes finished
ones until then, as an engine does that pads a batch to its longest."""


@dataclass
class Prefix:
    """A prompt without its last token, on its way into a slot."""

    token_ids: tuple[int, ...]
    slot: int
    """Where it is written."""
    num_filled: int = 0
    """Positions whose pieces have been scheduled."""

    @property
    def is_filled(self) -> bool:
        """Whether later passes, and later parts of this one, may attend to all of it."""
        return self.num_filled == len(self.token_ids)


@dataclass
class Row:
    """A completion in its slot."""

    completion: Completion
    slot: int
    position: int
    """Where the token that is to be fed next stands."""
    token: int
    """That token."""
    prefix: Prefix
    is_ready: bool = False
    """Whether the prefix lies in its own slot."""
    drafts: list[int] = field(default_factory=list)
    """Tokens proposed after `token` and not yet verified."""

    @property
    def next_tokens(self) -> list[int]:
        """The token and its drafts."""
        return [self.token, *self.drafts]


@dataclass
class Step:
    """What a lane does in one round."""

    lane: int
    """Its number."""
    rows: list[Row]
    is_draft: bool = False
    """Whether the rows propose a token instead of taking one."""
    num_drafted: int = 0
    """Tokens that each row's pass verifies, beside the one it decodes."""
    pieces: list[PromptPiece] = field(default_factory=list)
    piece_tokens: list[int] = field(default_factory=list)
    copies: list[PrefixCopy] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Tokens of each row."""
        return self.num_drafted + 1

    def row_tokens(self) -> list[int]:
        """What the rows feed, row by row; a draft that is no token feeds token 0 in vain."""
        fed = [row.next_tokens[-1:] if self.is_draft else row.next_tokens for row in self.rows]
        return [max(token, 0) for tokens in fed for token in tokens]


class Lane:
    """Slots whose rows go through the pipeline together."""

    def __init__(self, number: int, slots: range) -> None:
        self.number = number
        self.slots = slots
        self.free = list(slots)
        self.rows: list[Row] = []
        self.num_drafted = 0
        """Drafts that the ready rows have."""
        self.draft_target: int | None = None
        """How many they are to get before they are verified; absent between two cycles."""


class Scheduler:
    """The queue, the lanes and every prefix that somebody still waits for."""

    def __init__(
        self,
        rule: StopRule,
        *,
        num_slots: int,
        num_lanes: int,
        max_num_batched_tokens: int,
        batching: Batching = "continuous",
        draft_length: DraftLength | None = None,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> None:
        """There are at most `num_slots` lanes; with `draft_length` rows draft before they decode.

        `on_finished` gets each completion as soon as its last token is known.

        `max_num_batched_tokens` bounds the tokens of a pass, but one token of each row always runs.
        """
        self.completions: list[Completion] = []
        """Everything that was ever asked for, in order."""
        self._prompts: list[Prompt] = []
        self._queue: deque[Completion] = deque()
        self._rule = rule
        self._batching: Batching = batching
        self._max_num_batched_tokens = max_num_batched_tokens
        self._draft_length = draft_length
        self._on_finished = on_finished
        num_lanes = min(num_lanes, num_slots)
        ends = [num_slots * (lane + 1) // num_lanes for lane in range(num_lanes)]
        self.lanes = [
            Lane(number, range(start, end))
            for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        ]
        self._current_prefix: tuple[int, Prefix] | None = None
        """Prompt of the last admission and where its prefix is."""
        self._num_awaiting: Counter[int] = Counter()
        """For each slot, rows that have yet to take over the prefix in it."""
        self.prefilled_tokens = 0
        self.decoded_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def submit(self, prompts: Sequence[Prompt], num_samples: int) -> None:
        """Queue `num_samples` completions of each prompt."""
        for prompt in prompts:
            for sample in range(num_samples):
                number = len(self.completions)
                place = len(self._prompts)
                completion = Completion(number, place, sample, self._rule.limit(prompt))
                self.completions.append(completion)
                self._queue.append(completion)
            self._prompts.append(prompt)

    @property
    def is_done(self) -> bool:
        """Whether every completion is finished."""
        return not self._queue and not any(lane.rows for lane in self.lanes)

    def accept(self, lane: Lane, step: Step, tokens: list[list[int]], now: float) -> list[int]:
        """Take what was sampled after `step`, a list for each of its rows, at the time `now`.

        A list ends with the row's last new token, or goes on with NO_TOKEN. Returns slots whose
        keys and values may not be finite: they have to be cleared before anything else happens.
        """
        if step.is_draft:
            for row, sampled in zip(step.rows, tokens, strict=True):
                row.drafts.append(sampled[0])
            lane.num_drafted += 1
            return []
        broken = []
        accepted = []
        for row, sampled in zip(step.rows, tokens, strict=True):
            row.drafts = []
            if row.completion.finish_reason is not None:
                continue
            accepted.append(self._extend(row, sampled, now))
            if row.completion.finish_reason == "nan":
                broken.append(row.slot)
            if row.completion.finish_reason is not None and self._on_finished is not None:
                self._on_finished(row.completion)
        if self._draft_length is not None and step.rows:
            self._draft_length.update(step.num_drafted, accepted)
            self.drafted_tokens += step.num_drafted * len(step.rows)
            self.accepted_tokens += sum(accepted)
        lane.num_drafted, lane.draft_target = 0, None
        self._release(lane)
        return broken

    def next_step(self, lane: Lane) -> Step | None:
        """What the lane does now; None if it has nothing, or waits for another lane's prefill."""
        if self._draft_length is not None:
            step = self._draft_step(lane, self._draft_length)
            if step is not None:
                return step
        drafted = [row for row in lane.rows if row.is_ready] if lane.num_drafted else None
        self._admit(lane)
        step = Step(lane.number, [], num_drafted=lane.num_drafted)
        num_row_tokens = (len(drafted) if drafted else len(lane.rows)) * step.width
        self._fill(lane, step, max(1, self._max_num_batched_tokens - num_row_tokens))
        self._take_over_prefixes(lane, step)
        step.rows = drafted or [row for row in lane.rows if row.is_ready]
        if not step.rows and not step.pieces:
            return None
        self.decoded_tokens += len(step.rows) * step.width
        return step

    def _draft_step(self, lane: Lane, draft_length: DraftLength) -> Step | None:
        """Let the ready rows propose one more token, if they are to."""
        ready = [row for row in lane.rows if row.is_ready]
        if lane.draft_target is None:
            most_wanted = max(
                (row.completion.limit - len(row.completion.token_ids) - 1 for row in ready),
                default=0,
            )
            lane.draft_target = min(draft_length.current, most_wanted)
        if lane.num_drafted == lane.draft_target:
            return None
        self.decoded_tokens += len(ready)
        return Step(lane.number, ready, is_draft=True)

    def _extend(self, row: Row, sampled: list[int], now: float) -> int:
        """Give a row its new tokens; returns how many of them its drafts had right."""
        num_taken = 0
        for token in sampled:
            if token == NO_TOKEN and num_taken:
                break
            row.completion.append(token, self._rule, now)
            num_taken += 1
            if row.completion.finish_reason is not None:
                break
        if row.completion.finish_reason is None:
            row.position += num_taken
            row.token = row.completion.token_ids[-1]
        num_verified = sum(token != NO_TOKEN for token in sampled)
        return max(0, num_verified - 1)

    def _release(self, lane: Lane) -> None:
        """Free the slots of finished rows; a static lane keeps them until all are finished."""
        finished = [row for row in lane.rows if row.completion.finish_reason is not None]
        if not finished or (self._batching == "static" and len(finished) < len(lane.rows)):
            return
        lane.free = sorted([*lane.free, *(row.slot for row in finished)])
        lane.rows = [row for row in lane.rows if row.completion.finish_reason is None]

    def _admit(self, lane: Lane) -> None:
        """Give free slots to those who wait."""
        if self._batching == "static" and lane.rows:
            return
        while lane.free and self._queue:
            completion = self._queue.popleft()
            prompt = self._prompts[completion.prompt]
            prefix = self._known_prefix(completion.prompt)
            slot = self._choose_slot(lane, prefix)
            if slot is None:
                self._queue.appendleft(completion)
                return
            if prefix is None:
                prefix = Prefix(prompt.token_ids[:-1], slot)
                self._current_prefix = (completion.prompt, prefix)
            lane.free.remove(slot)
            self._num_awaiting[prefix.slot] += 1
            position = len(prompt.token_ids) - 1
            lane.rows.append(Row(completion, slot, position, prompt.token_ids[-1], prefix))

    def _known_prefix(self, prompt: int) -> Prefix | None:
        """The prefix of this prompt, if it lies in some slot or will."""
        if self._current_prefix is None or self._current_prefix[0] != prompt:
            return None
        return self._current_prefix[1]

    def _choose_slot(self, lane: Lane, prefix: Prefix | None) -> int | None:
        """A free slot: best the one that holds the prefix, none that holds an awaited one."""
        if prefix is not None and prefix.slot in lane.free:
            return prefix.slot
        return next((slot for slot in lane.free if not self._num_awaiting[slot]), None)

    def _fill(self, lane: Lane, step: Step, budget: int) -> None:
        """Schedule pieces of prefixes that are written in this lane, `budget` tokens at most."""
        for row in lane.rows:
            prefix = row.prefix
            if row.is_ready or prefix.is_filled or prefix.slot not in lane.slots:
                continue
            length = min(len(prefix.token_ids) - prefix.num_filled, budget)
            if length == 0:
                return
            start = prefix.num_filled
            step.pieces.append(PromptPiece(prefix.slot, start, length))
            step.piece_tokens += prefix.token_ids[start : start + length]
            prefix.num_filled += length
            budget -= length
            self.prefilled_tokens += length

    def _take_over_prefixes(self, lane: Lane, step: Step) -> None:
        """Make rows ready whose prefix is there, or can be copied in this pass."""
        targets: dict[int, list[int]] = {}
        lengths: dict[int, int] = {}
        for row in lane.rows:
            if row.is_ready or not row.prefix.is_filled:
                continue
            row.is_ready = True
            self._num_awaiting[row.prefix.slot] -= 1
            if row.slot != row.prefix.slot and row.prefix.token_ids:
                targets.setdefault(row.prefix.slot, []).append(row.slot)
                lengths[row.prefix.slot] = len(row.prefix.token_ids)
        step.copies = [
            PrefixCopy(source, tuple(slots), lengths[source]) for source, slots in targets.items()
        ]
