"""Measuring many things in turn, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")


def run_rounds(
    cases: Mapping[str, Callable[[], Result]],
    num_rounds: int,
    done: Callable[[int], None] = lambda num_runs: None,
) -> dict[str, list[Result]]:
    """Run every case once a round; every other round goes backwards, against steady drift.

    `done` hears after every run how many there have been. Returns the results by case, in order.
    """
    results: dict[str, list[Result]] = {key: [] for key in cases}
    num_runs = 0
    for number in range(num_rounds):
        keys = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for key in keys:
            results[key].append(cases[key]())
            num_runs += 1
            done(num_runs)
    return results
