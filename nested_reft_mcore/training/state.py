"""What a run counts and carries over a restart, and why its loop may be left early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.ranks import node_name
from nested_reft_mcore.mcore.agreement import gather_all


class StopRequest(Exception):
    """All processes have agreed to stop; what the present step has done is to be forgotten."""


class TroubleFound(Exception):
    """The same, because one of them cannot go on."""


@dataclass
class RunState:
    """What a run counts; comes back with a checkpoint.

    Every field is saved as JSON and restored by name, if the checkpoint is not older than it:
    whatever else has to survive a restart becomes a field here.
    """

    step: int = 0
    """Steps that are done."""
    skipped_updates: int = 0
    """Updates that were not taken because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """The latest of them, since the last update that was taken."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position in the data."""
    controller: dict[str, Any] = field(default_factory=dict)
    """What the skip controller has learnt; empty where there is none."""
    plan: str = ""
    """What the step that is done has skipped, as `LayerSkipPlan.describe` says it."""
    owed: dict[str, float] | None = None
    """The step's metrics, while it is not evaluated and recorded yet although its updates are done.
    Before the first step: empty, while the evaluation before training is to come."""

    def count(self, applied: bool, limit: int) -> None:
        """Note an update. RuntimeError after `limit` in a row that were not taken."""
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.skipped_updates += not applied
        if self.skipped_in_a_row >= limit:
            raise RuntimeError(
                f"step {self.step}: {limit} updates in a row had a loss or gradient that was not "
                "finite (train.max_skipped_updates); look for a learning rate that is too high, "
                "or for broken weights"
            )


class Trouble:
    """What this process has found that it cannot go on with: all save and stop where they next
    agree on it."""

    def __init__(self) -> None:
        self.text: str | None = None

    def note(self, text: str) -> None:
        """The first is the one that counts."""
        self.text = self.text or text

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Around what writes a file beside checkpoints: what cannot be written is trouble."""
        try:
            yield
        except OSError as error:
            self.note(f"{error.filename or path}: cannot be written: {error.strerror}")

    def of_all(self, context: ParallelContext) -> list[str]:
        """What each process has found, with rank and host; every process calls it."""
        mine = None if self.text is None else (node_name(os.environ), self.text)
        return [
            f"[rank {rank} on {found[0]}] {found[1]}"
            for rank, found in enumerate(gather_all(mine, context))
            if found is not None
        ]
