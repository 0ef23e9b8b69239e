"""Which rollouts go into a page that cannot hold all of them.

First the extremes, then failures, then the newest step; then, evenly over the steps, as many more
as there is room for. The order is a function of step and prompt, so that two runs keep rollouts of
the same steps and prompts, and can be compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from nested_reft_mcore.report.rollout_files import RolloutEntry

NUM_EXTREMES = 5
"""Rollouts at either end of each measure that are kept."""
MEASURES: dict[str, Callable[[RolloutEntry], float]] = {
    "reward": lambda entry: entry.reward,
    "length": lambda entry: entry.num_tokens,
    "mean log ratio": lambda entry: entry.mean_log_ratio,
    "largest log ratio": lambda entry: entry.largest_log_ratio,
}
RARE_FAILURES = ("error", "timeout", "nan")
_TRUNCATED_SHARE = 0.4
_NEWEST_SHARE = 0.25
EVALUATED_SHARE = 0.2
"""Of the room, for completions of evaluations, where training would take all."""


def weight(entry: RolloutEntry) -> float:
    """Bytes that a rollout takes in a page, roughly: text compresses, and so do numbers."""
    return 80 + 0.4 * entry.num_characters + 4.0 * entry.num_tokens


def select_both(entries: Sequence[RolloutEntry], budget: float) -> list[RolloutEntry]:
    """Those to show of training and of evaluations, which have at least a fifth of the room.

    Each part is selected by itself: an evaluation after the last step is not all that is new.
    """
    trained = [entry for entry in entries if not entry.kind]
    evaluated = [entry for entry in entries if entry.kind]
    room = max(EVALUATED_SHARE * budget, budget - _weigh(trained))
    shown = select(evaluated, room) if evaluated else []
    return [*select(trained, budget - _weigh(shown)), *shown]


def select(entries: Sequence[RolloutEntry], budget: float) -> list[RolloutEntry]:
    """Those to show, in the order of step, prompt and sample, of about `budget` bytes together.

    The extremes are kept whatever the budget; failures of judging before truncated completions.
    """
    chosen: set[RolloutEntry] = set(_extremes(entries))
    _fill(chosen, _spread(e for e in entries if e.failure in RARE_FAILURES), budget)
    newest = max((entry.step for entry in entries), default=0)
    room = _weigh(chosen)
    _fill(
        chosen,
        sorted(e for e in entries if e.step == newest),
        max(min(budget, room + _NEWEST_SHARE * budget), room),
    )
    room = _weigh(chosen)
    truncated = _spread(e for e in entries if e.failure == "truncated")
    _fill(chosen, truncated, min(budget, room + _TRUNCATED_SHARE * budget))
    _fill(chosen, _spread(entries), budget)
    return sorted(chosen)


def kept_counts(
    entries: Sequence[RolloutEntry], chosen: Sequence[RolloutEntry]
) -> dict[str, tuple[int, int]]:
    """(shown, of how many) for all rollouts, the newest step, and each kind of failure."""
    newest = max((entry.step for entry in entries), default=0)

    def count(some: Sequence[RolloutEntry]) -> Counter[str]:
        found = Counter(entry.failure for entry in some if entry.failure)
        found["all"], found["newest step"] = len(some), sum(e.step == newest for e in some)
        if any(e.kind for e in entries):
            found["evaluated"] = sum(e.kind != "" for e in some)
        return found

    shown, there = count(chosen), count(entries)
    return {name: (shown[name], there[name]) for name in there}


def _extremes(entries: Sequence[RolloutEntry]) -> list[RolloutEntry]:
    kept = []
    for measure in MEASURES.values():
        ordered = sorted(entries, key=lambda entry, m=measure: (m(entry), entry))
        # Equal rewards are no extremes: of those the newest are kept.
        kept += ordered[:NUM_EXTREMES] + ordered[-NUM_EXTREMES:]
    return kept


def _fill(chosen: set[RolloutEntry], candidates: Iterable[RolloutEntry], budget: float) -> None:
    """Add candidates in order until their weight reaches the budget."""
    used = _weigh(chosen)
    for entry in candidates:
        if entry in chosen:
            continue
        if used + weight(entry) > budget:
            return
        used += weight(entry)
        chosen.add(entry)


def _weigh(entries: Iterable[RolloutEntry]) -> float:
    return sum(weight(entry) for entry in entries)


def _spread(entries: Iterable[RolloutEntry]) -> list[RolloutEntry]:
    """A group of every step before the second of any; steps in an order that halves all gaps."""
    groups: dict[tuple[int, int], list[RolloutEntry]] = defaultdict(list)
    for entry in entries:
        groups[entry.step, entry.prompt_index].append(entry)
    seen: Counter[int] = Counter()
    keyed = []
    for step, prompt in sorted(groups):
        keyed.append((seen[step], _halving(step), prompt, step))
        seen[step] += 1
    return [entry for _, _, prompt, step in sorted(keyed) for entry in sorted(groups[step, prompt])]


def _halving(step: int) -> int:
    """The bits of the step reversed: ascending, they visit 0, 1/2, 1/4, 3/4, ... of a range."""
    return int(f"{step & 0xFFFFFFFF:032b}"[::-1], 2)
