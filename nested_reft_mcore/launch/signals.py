"""A polite stop: SIGUSR1 and SIGTERM set a flag, and the loop acts on it at a good moment.

And what if that moment does not come: a deadline, held even where the main thread is stuck.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.ranks import discover_ranks

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_LAST_WORDS_SECONDS = 10.0
_HEAD_START_SECONDS = 2.0
_WAKE = b"\0"
"""No signal has the number 0."""


@dataclass(frozen=True)
class _Deadline:
    seconds: float
    before_leaving: Callable[[], None]


class StopSignals:
    """While entered, SIGUSR1 and SIGTERM only set `requested`; the former handlers come back after.

    To be entered in the main thread, as Python demands of signal handlers.

    Python runs its handlers between two bytecodes of the main thread, so not while that waits in a
    collective. The deadline is therefore watched by a thread of its own, which the signal itself
    wakes through Python's wakeup descriptor. It needs the interpreter lock for a moment: a call
    into C that never lets go of that lock would hold it up (torch and gloo let go).
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._arrived_at = 0.0
        self._former: dict[signal.Signals, Any] = {}
        self._former_descriptor = -1
        self._deadline: _Deadline | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that asked."""
        return self._received

    def arm_deadline(self, seconds: float, before_leaving: Callable[[], None]) -> None:
        """Once a stop is asked for, leave with 75 after `seconds`, whatever the main thread does.

        Counts from the signal, also from one that came before this call, and ends on leaving the
        `with` block. Ranks other than 0 give rank 0 two seconds more, for its `before_leaving`:
        launchers end the others when one has left.

        Args:
            seconds: from the signal to the end; 0 disarms.
            before_leaving: the last thing that is done, in another thread than the main one, which
                may be anywhere. It gets ten seconds.

        Raises:
            ValueError: `seconds` is negative or not finite.
        """
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"seconds={seconds}; expected a finite number from 0 up")
        self._deadline = _Deadline(seconds, before_leaving) if seconds > 0 else None
        self._wake()

    def __enter__(self) -> StopSignals:
        reader, writer = self._ends = socket.socketpair()
        writer.setblocking(False)
        self._thread = threading.Thread(
            target=self._watch, args=(reader,), name="stop-deadline", daemon=True
        )
        self._thread.start()
        # A hook stays for ever; this one must not keep the object with it.
        me = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget_descriptor(me()))
        # What else writes here (asyncio, say) is put back after; bytes may be lost, not waited for.
        self._former_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
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
        signal.set_wakeup_fd(self._former_descriptor)
        self._deadline = None
        if self._ends is not None and self._thread is not None:
            reader, writer = self._ends
            writer.close()
            self._thread.join()
            reader.close()
        self._ends = self._thread = None

    @property
    def entered(self) -> bool:
        """Whether signals are watched at present."""
        return self._ends is not None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._arrive(signum)

    def _arrive(self, signum: int) -> None:
        """Either the handler or the thread is first."""
        if self._received is None:
            self._arrived_at = time.monotonic()
            self._received = signal.Signals(signum)

    def _wake(self) -> None:
        if self._ends is not None:
            # A full buffer wakes the thread as well.
            with contextlib.suppress(BlockingIOError):
                self._ends[1].send(_WAKE)

    def _watch(self, reader: socket.socket) -> None:
        """The thread: note signals, and leave when the deadline passes; ends with the writer."""
        while True:
            left = self._seconds_left()
            if left is not None and left <= 0:
                self._leave()
            reader.settimeout(left)
            try:
                data = reader.recv(4096)
            except TimeoutError:
                continue
            if not data:
                return
            for number in data:
                if number in STOP_SIGNALS:
                    self._arrive(number)

    def _seconds_left(self) -> float | None:
        deadline = self._deadline
        if deadline is None or self._received is None:
            return None
        patience = deadline.seconds + (0.0 if _is_rank_0() else _HEAD_START_SECONDS)
        return self._arrived_at + patience - time.monotonic()

    def _leave(self) -> None:
        deadline, received = self._deadline, self._received
        if deadline is None or received is None:
            # Left the block between two looks.
            return
        # Not through sys.stderr: the main thread may hold its lock for ever.
        os.write(
            2,
            f"{received.name}: not done {deadline.seconds:g} s later (the stop deadline); leaving "
            "without saving, the last checkpoint stands\n".encode(),
        )
        # It may wait for the very disk that holds up the main thread.
        words = threading.Thread(target=_say, args=(deadline.before_leaving,), daemon=True)
        words.start()
        words.join(_LAST_WORDS_SECONDS)
        os._exit(ExitCode.COME_BACK)


def _forget_descriptor(stop: StopSignals | None) -> None:
    """In a forked child: its signals are not its parent's, and must not wake the thread there."""
    if stop is not None and stop.entered:
        signal.set_wakeup_fd(-1)


def _say(before_leaving: Callable[[], None]) -> None:
    try:
        before_leaving()
    except Exception:
        os.write(2, traceback.format_exc().encode())


def _is_rank_0() -> bool:
    try:
        ranks = discover_ranks(os.environ)
    except UserError:
        return True
    return ranks is None or ranks.rank == 0
