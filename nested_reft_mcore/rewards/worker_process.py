"""The pool's side of one reward worker: start it, hand it items, notice that it is gone."""

from __future__ import annotations

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
from nested_reft_mcore.rewards import messages
from nested_reft_mcore.rewards.base import RewardItem, RewardResult

START_SECONDS = 120.0
"""A worker that is not ready after so long, sympy imported from a slow file system, never is."""
GRACE_SECONDS = 5.0
"""The worker keeps the deadline itself; the pool steps in this much later."""
READ_BYTES = 1 << 16


class WorkerLost(Exception):
    """A worker died or went silent while it judged an item."""

    def __init__(self, reason: str, timed_out: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.timed_out = timed_out


class WorkerProcess:
    """One process of `nested_reft_mcore.rewards.worker`."""

    def __init__(self, reward_name: str, deadline_seconds: float) -> None:
        """Start the process; it becomes ready in its own time."""
        self._deadline_seconds = deadline_seconds
        self._buffer = messages.MessageBuffer()
        self._is_ready = False
        command = [sys.executable, "-m", "nested_reft_mcore.rewards.worker"]
        self._process = subprocess.Popen(
            [*command, reward_name, repr(deadline_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin.fileno()
        self._answers = self._process.stdout.fileno()
        os.set_blocking(self._requests, False)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it imported the reward."""
        return self._is_ready

    def wait_until_ready(self) -> None:
        """Wait for the reward to be imported. UserError if it cannot be, WorkerLost if it died."""
        if self._is_ready:
            return
        message = self._receive(START_SECONDS)
        if "failed" in message:
            raise UserError(message["failed"])
        self._is_ready = True

    def judge(self, items: Sequence[RewardItem]) -> Iterator[RewardResult]:
        """Results in order, as they come. WorkerLost at the item that ended the worker."""
        batch = [[item.prompt, item.completion, item.answer] for item in items]
        self._send(messages.encode(batch), START_SECONDS)
        for _ in items:
            value, error = self._receive(self._deadline_seconds + GRACE_SECONDS)
            yield RewardResult(value, error)

    def close(self) -> None:
        """End the process at once, and forget it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
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
        while (message := self._buffer.take()) is None:
            self._wait_for(self._answers, select.POLLIN, end)
            data = os.read(self._answers, READ_BYTES)
            if not data:
                raise self._lost()
            self._buffer.add(data)
        return message

    def _wait_for(self, descriptor: int, event: int, end: float) -> None:
        """Wait until a pipe is usable or closed; WorkerLost at time `end`."""
        poller = select.poll()
        poller.register(descriptor, event)
        if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
            raise WorkerLost(f"no answer; the deadline is {self._deadline_seconds:g} s", True)

    def _lost(self) -> WorkerLost:
        """Why the process closed its pipes."""
        try:
            code = self._process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerLost("the worker closed its pipe", False)
        if code == -signal.SIGALRM:
            return WorkerLost(f"longer than the deadline of {self._deadline_seconds:g} s", True)
        if code < 0:
            return WorkerLost(f"the worker died by signal {-code}", False)
        return WorkerLost(f"the worker left with exit code {code}", False)


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
