"""From run directories to a page of bounded size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nested_reft_mcore.report.page import packed, render_page
from nested_reft_mcore.report.page_data import rollouts_data, run_data
from nested_reft_mcore.report.rollout_files import RolloutIndex, index_rollouts
from nested_reft_mcore.report.run_record import RunRecord
from nested_reft_mcore.report.selection import select_both, weight

_ATTEMPTS = 4
_LEAST_BYTES = 50_000
"""Of rollouts, however much the curves take."""


@dataclass(frozen=True)
class Page:
    """A page, and what to say about it."""

    html: str
    counts: list[dict[str, list[int]]]
    """For each run, (shown, of how many) rollouts, newest ones and failures."""


def build_page(
    runs: Sequence[RunRecord],
    max_bytes: int,
    *,
    with_rollouts: bool = True,
    told: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Page:
    """The page of these runs, of at most about `max_bytes`.

    Curves are kept whole; rollouts are chosen to fit what they leave. `told` hears the name of a
    run, and how many bytes of how many of its rollouts are read.
    """
    title = " · ".join(run.name for run in runs)
    overview = packed(
        {
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "runs": [run_data(run) for run in runs],
        }
    )
    indices = []
    for run in runs:
        indices.append(
            index_rollouts(run.directory, lambda done, total, n=run.name: told(n, done, total))
            if with_rollouts
            else RolloutIndex()
        )
    page = render_page(title, {"overview": overview, "rollouts": ""})
    room = max(max_bytes - len(page.encode("utf-8")), _LEAST_BYTES)
    text, counts = _packed_rollouts(indices, room)
    return Page(render_page(title, {"overview": overview, "rollouts": text}), counts)


def _packed_rollouts(
    indices: Sequence[RolloutIndex], max_bytes: int
) -> tuple[str, list[dict[str, list[int]]]]:
    """Rollouts of all runs, each with an equal share of the room; fewer until they fit."""
    budget = max_bytes / max(len(indices), 1)
    for attempt in range(_ATTEMPTS):
        chosen = [select_both(index.entries, budget) for index in indices]
        data = [rollouts_data(index, some) for index, some in zip(indices, chosen, strict=True)]
        text = packed(data)
        whole = all(len(c) == len(i.entries) for c, i in zip(chosen, indices, strict=True))
        # Weights are guesses: the first attempt tells what they are worth.
        guessed = sum(weight(entry) for some in chosen for entry in some) or 1.0
        fits = len(text) <= max_bytes
        if fits and (whole or attempt > 0):
            break
        budget = 0.95 * max_bytes * guessed / len(text) / max(len(indices), 1)
    return text, [one["counts"] for one in data]
