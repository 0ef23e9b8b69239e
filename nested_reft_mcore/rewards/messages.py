"""Messages between a reward pool and its workers: JSON after a length of four bytes."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

_LENGTH = struct.Struct(">I")
MAX_ANSWER_BYTES = 1 << 24
"""Longest answer of a worker: numbers for half a million completions."""


def encode(message: Any) -> bytes:
    """A message as bytes. ASCII, so that a lone surrogate in a completion survives the trip.

    What JSON has no form for, a date in the data for instance, becomes text.
    """
    body = json.dumps(message, ensure_ascii=True, default=str).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def read(file: BinaryIO) -> Any:
    """The next message of a buffered binary file, or None at its end."""
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    body = file.read(length)
    return json.loads(body) if len(body) == length else None


class MessageBuffer:
    """Bytes as they come from a worker's pipe, taken out as whole messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        """Bytes that are not taken out yet."""
        return len(self._bytes)

    def add(self, data: bytes) -> None:
        """Append what was read."""
        self._bytes += data

    def take(self) -> Any:
        """The oldest whole message, or None if there is none yet.

        ValueError if what lies in the pipe is no message of a worker: the reward wrote to it.
        """
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > MAX_ANSWER_BYTES:
            raise ValueError(f"a message of {length} bytes")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_LENGTH.size : end])
        del self._bytes[:end]
        return json.loads(body)
