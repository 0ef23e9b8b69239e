"""A polite stop: SIGUSR1 and SIGTERM set a flag, and the loop acts on it at a good moment."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopSignals:
    """While entered, SIGUSR1 and SIGTERM only set `requested`; the former handlers come back after.

    To be entered in the main thread, as Python demands of signal handlers.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that asked."""
        return self._received

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(signum)

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            # A handler that Python did not install reads as None and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former = {}
