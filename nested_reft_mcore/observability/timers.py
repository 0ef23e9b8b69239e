"""Where the time of a step goes, as `timing_s/<name>` values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PREFIX = "timing_s/"


class Timers:
    """Wall-clock seconds of named phases: `with timers("gen"): ...`, then `timers.collect()`.

    Phases may lie inside each other; each counts its whole time, so `step` contains `gen`. A phase
    that is entered several times adds up. One thread only.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        """`synchronize` waits for the device (`torch.cuda.synchronize`) at both ends of a phase.

        Without it, work that a device has not finished is charged to whoever waits for it next.
        `on_phase` is told the innermost phase whenever that changes; empty outside of all. A phase
        that an error ends stays the last one that it has heard of.
        """
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._on_phase = on_phase
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the enclosed block under `name`, also when it raises.

        Raises ValueError where `name` is being timed already: its time would count twice.
        """
        if name in self._open:
            raise ValueError(f"timer {name!r} is already running")
        self._open.append(name)
        self._tell()
        self._wait()
        started = self._clock()
        try:
            yield
        except BaseException:
            # Not waiting here: a device that broke would hide what happened behind its own error.
            self._stop(name, started)
            raise
        self._wait()
        self._stop(name, started)
        self._tell()

    def collect(self) -> dict[str, float]:
        """Seconds of every phase that has ended since the last call, as `timing_s/<name>`.

        Phases that are still running are left alone and appear in a later call.
        """
        collected = {_PREFIX + name: seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return collected

    def _tell(self) -> None:
        if self._on_phase is not None:
            self._on_phase(self._open[-1] if self._open else "")

    def _wait(self) -> None:
        if self._synchronize is not None:
            self._synchronize()

    def _stop(self, name: str, started: float) -> None:
        self._open.remove(name)
        self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - started
