"""What rewards print: passed on to the log up to a limit, and quoted when a worker dies."""

from __future__ import annotations

import logging

MAX_OUTPUT_BYTES = 64 << 10
"""So much of what all workers of a pool print reaches the log; the rest is read and dropped."""
MAX_LINE_CHARACTERS = 500
"""Longer lines are cut."""
TAIL_BYTES = 300
"""So much of a worker's last words is quoted when it dies."""

_log = logging.getLogger(__name__)


class OutputBudget:
    """How much the workers of one pool may still have logged."""

    def __init__(self) -> None:
        self.left = MAX_OUTPUT_BYTES

    def take(self, num_bytes: int) -> bool:
        """Whether so much may be logged; says once when no more is."""
        if self.left <= 0:
            return False
        self.left -= num_bytes
        if self.left <= 0:
            _log.warning(
                "reward workers have printed %d KiB; what they print from now on is left out",
                MAX_OUTPUT_BYTES >> 10,
            )
        return self.left > 0


class WorkerOutput:
    """The standard output and error of one worker."""

    def __init__(self, budget: OutputBudget) -> None:
        self._budget = budget
        self._line = b""
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """Take what was read; whole lines go to the log."""
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if self._budget.left <= 0:
            return
        *lines, self._line = (self._line + data).split(b"\n")
        # A line without an end is not collected for ever.
        if len(self._line) > 4 * MAX_LINE_CHARACTERS:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            text = _printable(line[:MAX_LINE_CHARACTERS])
            if text.strip() and self._budget.take(len(text)):
                _log.info("a reward says: %s", text)

    def forget(self) -> None:
        """What comes from now on is of another worker."""
        self._line = self._tail = b""

    @property
    def last_words(self) -> str:
        """The end of what it printed, on one line; empty if it printed nothing."""
        return " ".join(_printable(self._tail).split())


def _printable(data: bytes) -> str:
    """Text without control characters, which could write anywhere on a terminal."""
    text = data.decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in text)
