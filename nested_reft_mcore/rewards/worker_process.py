"""The pool's side of one reward worker: start it, hand it calls, notice that it is gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import RewardFunctionConfig
from nested_reft_mcore.rewards import messages
from nested_reft_mcore.rewards.base import RewardItem, Scope
from nested_reft_mcore.rewards.calls import Call
from nested_reft_mcore.rewards.worker_output import OutputBudget, WorkerOutput

START_SECONDS = 120.0
"""A worker that is not ready after so long, sympy imported from a slow file system, never is."""
GRACE_SECONDS = 5.0
"""The worker keeps the deadline itself; the pool steps in this much later."""
READ_BYTES = 1 << 16


class WorkerLost(Exception):
    """A worker died or went silent while it judged."""

    def __init__(self, reason: str, timed_out: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.timed_out = timed_out


class WorkerProcess:
    """One process of `nested_reft_mcore.rewards.worker`, with its supervisor."""

    def __init__(
        self,
        functions: Sequence[RewardFunctionConfig],
        deadline_seconds: float,
        memory_bytes: int,
        budget: OutputBudget,
    ) -> None:
        """Start the process; it becomes ready in its own time."""
        self._deadline_seconds = deadline_seconds
        self._buffer = messages.MessageBuffer()
        self._output = WorkerOutput(budget)
        settings = {
            "functions": [{"name": each.name, "options": each.options} for each in functions],
            "deadline_seconds": deadline_seconds,
            "memory_bytes": memory_bytes,
        }
        self.scopes: tuple[Scope, ...] | None = None
        """What one call of each function judges; None until the worker is ready."""
        life, self._life = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nested_reft_mcore.rewards.worker", str(life)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
            start_new_session=True,
            pass_fds=(life,),
        )
        os.close(life)
        self._pid = self._process.pid
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._requests = self._process.stdin.fileno()
        self._answers = self._process.stdout.fileno()
        self._prints: int | None = self._process.stderr.fileno()
        os.set_blocking(self._requests, False)
        # One that is dead already says so where it is waited for.
        with contextlib.suppress(WorkerLost):
            self._send(messages.encode(settings), START_SECONDS)

    @property
    def pid(self) -> int:
        """Process id of the worker proper; until it is ready, of its supervisor."""
        return self._pid

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait for the imports. UserError if the rewards cannot be, WorkerLost if it died."""
        if self.scopes is not None:
            return
        message = self._receive(START_SECONDS)
        if "failed" in message:
            raise UserError(message["failed"])
        self._pid = message["pid"]
        self.scopes = tuple(message["scopes"])

    def judge(
        self, items: Sequence[RewardItem], places: Sequence[int], calls: Sequence[Call]
    ) -> Iterator[tuple[list[float] | None, str | None]]:
        """Values of each call, or why there are none, as they come.

        `places` are those of the items that the calls judge, ascending. WorkerLost at the call that
        ended the worker.
        """
        local = {place: number for number, place in enumerate(places)}
        request = {
            "items": [vars(items[place]) for place in places],
            "calls": [[call.function, [local[place] for place in call.items]] for call in calls],
        }
        self._send(messages.encode(request), START_SECONDS)
        for _ in calls:
            values, error = self._receive(self._deadline_seconds + GRACE_SECONDS)
            yield values, error

    def close(self) -> None:
        """End the process and all that it has started, at once, and forget it."""
        os.close(self._life)
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            # The supervisor itself hangs: somebody stopped it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._drain()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _send(self, data: bytes, seconds: float) -> None:
        """Write all of `data`, however little of it the pipe takes at once."""
        end = time.monotonic() + seconds
        rest = memoryview(data)
        while rest:
            self._wait_for(self._requests, select.POLLOUT, end)
            try:
                rest = rest[os.write(self._requests, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._lost() from None

    def _receive(self, seconds: float) -> Any:
        """The worker's next message."""
        end = time.monotonic() + seconds
        while (message := self._take()) is None:
            self._wait_for(self._answers, select.POLLIN, end)
            data = os.read(self._answers, READ_BYTES)
            if not data:
                raise self._lost()
            self._buffer.add(data)
        return message

    def _take(self) -> Any:
        try:
            return self._buffer.take()
        except ValueError as error:
            raise WorkerLost(f"the reward wrote to the worker's pipe: {error}", False) from None

    def _wait_for(self, descriptor: int, event: int, end: float) -> None:
        """Wait until a pipe is usable or closed; WorkerLost at time `end`."""
        poller = select.poll()
        poller.register(descriptor, event)
        if self._prints is not None:
            poller.register(self._prints, select.POLLIN)
        while True:
            ready = poller.poll(max(0.0, end - time.monotonic()) * 1000)
            if any(number == descriptor for number, _ in ready):
                return
            if time.monotonic() >= end:
                raise WorkerLost(f"no answer; the deadline is {self._deadline_seconds:g} s", True)
            if ready and not self._read_prints():
                poller.unregister(ready[0][0])

    def _read_prints(self) -> bool:
        """Read once what the worker printed; False at the end of it."""
        if self._prints is None:
            return False
        data = os.read(self._prints, READ_BYTES)
        self._output.feed(data)
        if not data:
            self._prints = None
        return bool(data)

    def _drain(self) -> None:
        """Read what is left of the worker's prints, without waiting for more."""
        if self._prints is not None:
            os.set_blocking(self._prints, False)
            with contextlib.suppress(BlockingIOError):
                while self._read_prints():
                    pass

    def _lost(self) -> WorkerLost:
        """Why the process closed its pipes."""
        try:
            code = self._process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerLost("the worker closed its pipe", False)
        if code == -signal.SIGALRM:
            return WorkerLost(f"longer than the deadline of {self._deadline_seconds:g} s", True)
        self._drain()
        words = self._output.last_words
        said = f"; it said: {words}" if words else ""
        if code < 0:
            return WorkerLost(f"the worker died by signal {-code}{said}", False)
        return WorkerLost(f"the worker left with exit code {code}{said}", False)


def _environment() -> dict[str, str]:
    """The pool's environment, in which the worker finds this package wherever it was found."""
    import nested_reft_mcore

    root = str(Path(nested_reft_mcore.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": root if not inherited else os.pathsep.join([root, inherited]),
        # A file in the working directory must not stand in for a module of the same name.
        "PYTHONSAFEPATH": "1",
    }
