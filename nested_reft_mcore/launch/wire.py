"""JSON lines over a socket, without ever waiting for the other side."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from typing import Any

_MAX_LINE_BYTES = 1 << 20


class LineClosed(Exception):
    """The other side has closed the connection, or it broke."""


class Wire:
    """One end of a connection. One thread only."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._in = b""
        self._out = b""

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Put a message on its way; what the socket does not take now goes with the next call.

        Raises:
            LineClosed: it cannot arrive any more.
        """
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self, seconds: float = 0.0) -> None:
        """Send what is waiting, for at most so long. Raises LineClosed."""
        end = time.monotonic() + seconds
        while self._out:
            try:
                self._out = self._out[self._socket.send(self._out) :]
            except BlockingIOError:
                left = end - time.monotonic()
                if left <= 0 or not select.select([], [self._socket], [], left)[1]:
                    break
            except OSError as error:
                raise LineClosed(str(error)) from error
        if len(self._out) > _MAX_LINE_BYTES:
            # Nobody reads there; whoever watches over it finds that out by its silence.
            self._out = b""

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come. Raises LineClosed at the end, or where they mean nothing."""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                raise LineClosed(str(error)) from error
            if not data:
                raise LineClosed("closed by the other side")
            self._in += data
            # What else has come is read by the next call; an end comes after the last line.
            if b"\n" in data or len(self._in) > _MAX_LINE_BYTES:
                break
        *lines, self._in = self._in.split(b"\n")
        if len(self._in) > _MAX_LINE_BYTES:
            raise LineClosed("a message that is too long")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise LineClosed(f"not a message: {error}") from error
        if not all(isinstance(message, dict) for message in messages):
            raise LineClosed("not a message")
        return messages

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
