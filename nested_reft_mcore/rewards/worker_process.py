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

GRACE_SECONDS = 5.0
"""The worker keeps deadlines itself; the pool steps in this much later."""
TAKE_UP_SECONDS = 60.0
"""A worker that has not read its items after so long, on a machine however busy, never will."""
READ_BYTES = 1 << 16


class WorkerLost(Exception):
    """A worker died or went silent; `had_begun` if a call can have been the reason."""

    def __init__(self, reason: str, timed_out: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.timed_out = timed_out
        self.had_begun = True


class WorkerProcess:
    """One process of `nested_reft_mcore.rewards.worker`, with its supervisor."""

    def __init__(
        self,
        functions: Sequence[RewardFunctionConfig],
        deadline_seconds: float,
        memory_bytes: int,
        start_seconds: float,
        budget: OutputBudget,
    ) -> None:
        """Start the process; it becomes ready in its own time."""
        self._deadline_seconds = deadline_seconds
        self._start_seconds = start_seconds
        self._buffer = messages.MessageBuffer()
        self._output = WorkerOutput(budget)
        settings = {
            "functions": [{"name": each.name, "options": each.options} for each in functions],
            "deadline_seconds": deadline_seconds,
            "memory_bytes": memory_bytes,
            "start_seconds": start_seconds,
        }
        self.scopes: tuple[Scope, ...] | None = None
        """What one call of each function judges; None until a worker has been ready."""
        self.forks = False
        """Whether a lost worker is replaced by a fork, at once; known when one is ready."""
        self._is_ready = False
        self._has_taken = False
        self._can_go_on = True
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
            self._send(messages.encode(settings), start_seconds)

    @property
    def pid(self) -> int:
        """Process id of the worker proper; until it is ready, of its supervisor."""
        return self._pid

    @property
    def can_go_on(self) -> bool:
        """Whether there is a worker, or one on its way; else this one has to be replaced."""
        return self._can_go_on and self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait for the imports, or for the fork in place of a lost worker.

        Raises:
            UserError: the rewards cannot be imported.
            WorkerLost: it died, or is not ready in time.
        """
        # One that was lost while nobody asked it anything has a successor.
        while not self._is_ready or self._has_message():
            # The worker itself breaks off imports; the pool those that cannot be.
            message = self._receive(self._start_seconds + GRACE_SECONDS)
            if not isinstance(message, dict):
                raise WorkerLost("the reward wrote to the worker's pipe", False)
            if "failed" in message:
                raise UserError(message["failed"])
            if "lost" in message:
                if not self._is_ready:
                    raise self._lost_worker(message["lost"])
                self._is_ready = False
                self._output.forget()
                continue
            self._pid, self.forks = message["pid"], message["forks"]
            self.scopes = tuple(message["scopes"])
            self._is_ready = True

    def judge(
        self, items: Sequence[RewardItem], places: Sequence[int], calls: Sequence[Call]
    ) -> Iterator[tuple[list[float] | None, str | None]]:
        """Values of each call, or why there are none, as they come.

        `places` are those of the items that the calls judge, ascending. WorkerLost at the call that
        ended the worker, or before the first, if it died before it had the items.
        """
        local = {place: number for number, place in enumerate(places)}
        request = {
            "items": [vars(items[place]) for place in places],
            "calls": [[call.function, [local[place] for place in call.items]] for call in calls],
        }
        # Unless a worker took the items up, nobody knows what the next one would read.
        self._can_go_on = self._has_taken = False
        try:
            self._send(messages.encode(request), TAKE_UP_SECONDS)
            self._answer(TAKE_UP_SECONDS)
        except WorkerLost as lost:
            lost.had_begun = False
            raise
        for _ in calls:
            values, error = self._answer(self._deadline_seconds + GRACE_SECONDS)
            yield values, error
        self._can_go_on = True

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

    def _answer(self, seconds: float) -> Any:
        """What the worker says next about the items that it was given."""
        message = self._receive(seconds)
        if isinstance(message, dict) and "lost" in message:
            self._is_ready, self._can_go_on = False, self._has_taken
            lost = self._lost_worker(message["lost"])
            self._output.forget()
            raise lost
        self._has_taken = True
        return message

    def _has_message(self) -> bool:
        """Whether the worker has said something that was not asked for."""
        poller = select.poll()
        poller.register(self._answers, select.POLLIN)
        return len(self._buffer) > 0 or bool(poller.poll(0))

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
        return self._lost_worker(code)

    def _lost_worker(self, code: int) -> WorkerLost:
        """Why a worker ended, by its exit code; negative for a signal."""
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
        # One thread a worker, unless somebody asked for more: all workers share the machine, and a
        # process that numpy has given threads cannot be forked.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": root if not inherited else os.pathsep.join([root, inherited]),
        # A file in the working directory must not stand in for a module of the same name.
        "PYTHONSAFEPATH": "1",
    }
