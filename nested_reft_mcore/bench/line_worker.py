"""A process that answers a line of JSON with a line of JSON, and waits without work in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

_TAIL_BYTES = 4000
_POLL_SECONDS = 1.0


class WorkerFailed(Exception):
    """The process has left, says something else than JSON, or takes too long."""


class LineWorker:
    """Starts the process; a context manager that ends it.

    Its stderr goes to a temporary file, of which the end is told where it fails. When its input
    ends, also because this process has died, the worker is expected to leave.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """`environment`: what is added to this process's own. Raises WorkerFailed."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **environment},
            )
        except OSError as error:
            self._log.close()
            raise WorkerFailed(f"{command[0]}: {error.strerror}") from error
        self._waiting = b""

    def ask(self, request: Mapping[str, Any], deadline_seconds: float = 600.0) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises WorkerFailed."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError as error:
            raise self._failed("has left") from error
        return self.hear(deadline_seconds)

    def hear(self, deadline_seconds: float = 600.0) -> dict[str, Any]:
        """Wait for the next line. Raises WorkerFailed."""
        line = self._read_line(time.monotonic() + deadline_seconds)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._failed(f"said {line[:80]!r}, which is no JSON object")
        return answer

    def close(self) -> None:
        """End the process, by force if it does not leave by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # What was written last may never have got there: the worker is gone already.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> LineWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_line(self, deadline: float) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        while b"\n" not in self._waiting:
            if time.monotonic() > deadline:
                self._process.kill()
                raise self._failed("took too long")
            if select.select([stdout], [], [], _POLL_SECONDS)[0]:
                found = os.read(stdout.fileno(), 65536)
                if not found:
                    self._process.wait()
                    raise self._failed(f"left with {self._process.returncode}")
                self._waiting += found
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line

    def _failed(self, what: str) -> WorkerFailed:
        """The exception, with the last line of stderr, which mostly says why."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_BYTES))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return WorkerFailed(f"{what}: {lines[-1].strip()}" if lines else what)
