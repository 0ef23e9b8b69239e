"""How far a copy of many bytes has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich import progress
from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Bytes done, speed and time left. A context manager; shows nothing unless `shown`."""

    def __init__(
        self,
        title: str,
        num_bytes: int,
        shown: bool,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._num_bytes = max(num_bytes, 1)
        self._shown = shown
        self._stream = stream or sys.stderr
        self._clock = clock
        self._done = 0
        self._bar: progress.Progress | None = None
        self._task = progress.TaskID(0)

    def __enter__(self) -> ByteProgress:
        self._started = self._said = self._clock()
        if self._shown and self._stream.isatty():
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self._title, total=self._num_bytes)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._shown and self._clock() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = self._clock()
            speed = self._done / (self._said - self._started)
            left = max(0.0, self._num_bytes - self._done) / speed
            print(
                f"{self._title}: {self._done / 1e9:.1f} of {self._num_bytes / 1e9:.1f} GB, "
                f"{speed / 1e6:.0f} MB/s, {left:.0f} s left",
                file=self._stream,
                flush=True,
            )
