"""How many tokens to draft before the full model looks at them."""

from __future__ import annotations

from collections.abc import Sequence

_PRIOR_ACCEPTANCE = 0.8
_PRIOR_TRIALS = 8.0
_MEMORY = 0.9
_PASSES_BETWEEN_PROBES = 32


class DraftLength:
    """Adapts the number of drafted tokens to the share of them that is accepted.

    If each draft is accepted with probability a, g drafts and the check after them yield
    1 + a + ... + a^g tokens for the time of g * c + 1 full steps, where c is the cost of a draft
    step (Theorem 3.8 of arXiv 2211.17192). `current` is the g that yields most per time, the
    smallest of several; 0 means that drafting does not pay and the full model decodes alone.

    The estimate of a is a running mean over drafts that were really judged, those up to the first
    rejected one: what was said a pass ago counts 0.9 as much. It starts at 0.8, with the weight of
    8 drafts. While `current` is 0 nothing is learnt, so every 32nd pass drafts one token; what is
    known counts no more than 8 drafts then, so that a few good probes bring drafting back.

    Nothing enters but the counts, so every pipeline stage that sees the same counts comes to the
    same lengths.
    """

    def __init__(self, max_draft_tokens: int, draft_cost: float) -> None:
        """Longest draft, and what a draft step costs in full steps: 0 (free) to 1 (as much).

        Where looking at one token more makes the full model's pass dearer (as on a CPU, which is
        not bound by reading weights), that share of a full step is to be added to `draft_cost`.
        ValueError if either is negative.
        """
        if max_draft_tokens < 0 or not draft_cost >= 0:
            raise ValueError(
                "max_draft_tokens and draft_cost must not be negative, found "
                f"{max_draft_tokens} and {draft_cost}"
            )
        self._max_draft_tokens = max_draft_tokens
        self._draft_cost = draft_cost
        self._acceptance = _PRIOR_ACCEPTANCE
        self._trials = _PRIOR_TRIALS
        self._idle_passes = 0

    @property
    def current(self) -> int:
        """Tokens to draft before the next check, 0 to `max_draft_tokens`."""
        best = max(range(self._max_draft_tokens + 1), key=self._tokens_per_cost)
        if best == 0 and self._idle_passes >= _PASSES_BETWEEN_PROBES:
            return min(1, self._max_draft_tokens)
        return best

    @property
    def acceptance(self) -> float:
        """The estimate of the probability that a draft is accepted."""
        return self._acceptance

    def update(self, num_drafted: int, accepted: Sequence[int]) -> None:
        """Learn from one pass: every row drafted `num_drafted` tokens and accepted so many.

        To be called after passes without drafts too, with `num_drafted` 0.
        """
        if num_drafted == 0 or not accepted:
            self._idle_passes += 1
            return
        successes = sum(accepted)
        trials = sum(min(number + 1, num_drafted) for number in accepted)
        if self._idle_passes:
            self._trials = min(self._trials, _PRIOR_TRIALS)
            self._idle_passes = 0
        known = self._trials * _MEMORY
        self._acceptance = (self._acceptance * known + successes) / (known + trials)
        self._trials = known + trials

    def _tokens_per_cost(self, num_draft_tokens: int) -> float:
        tokens = sum(self._acceptance**i for i in range(num_draft_tokens + 1))
        return tokens / (num_draft_tokens * self._draft_cost + 1)
