"""A file of many bytes, on the disk and with a known checksum as soon as it is closed."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

_BYTES_BETWEEN_SYNCS = 2**27
_BLOCK_BYTES = 2**20
"""What is hashed and copied stays in the processor's cache."""


class DurableFile:
    """A new file, written from start to end. A context manager.

    The disk works beside the writer: what has been written is sent to it again and again by a
    thread, so that closing waits for little. Checksums are taken on the way, if wanted, so that
    nobody has to read the file again.
    """

    def __init__(self, path: Path, *, checksum: bool) -> None:
        """Write to `path`, with a SHA-256 or without."""
        self._path = path
        self._sha256 = hashlib.sha256() if checksum else None
        self._sync: Future[None] | None = None
        self._num_bytes = self._sent = 0
        self.failure: OSError | None = None
        """What went wrong while writing, for callers behind a library that hides it."""

    def __enter__(self) -> DurableFile:
        self._file = self._path.open("wb")
        self._syncer = ThreadPoolExecutor(max_workers=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file, self._syncer:
            if self._sync is not None:
                self._sync.result()
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, data: Any) -> int:
        """Append bytes, or anything that has them; returns how many. Raises OSError."""
        with memoryview(data).cast("B") as view:
            count = view.nbytes
            try:
                for start in range(0, count, _BLOCK_BYTES):
                    block = view[start : start + _BLOCK_BYTES]
                    if self._sha256 is not None:
                        self._sha256.update(block)
                    self._file.write(block)
            except OSError as error:
                self.failure = error
                raise
        self._num_bytes += count
        is_idle = self._sync is None or self._sync.done()
        if is_idle and self._num_bytes - self._sent >= _BYTES_BETWEEN_SYNCS:
            if self._sync is not None:
                self._sync.result()
            self._sent = self._num_bytes
            self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())
        return count

    def flush(self) -> None:
        """As any file's."""
        self._file.flush()

    def tell(self) -> int:
        """How many bytes were written."""
        return self._num_bytes

    @property
    def sha256(self) -> str:
        """Checksum of what was written, in lower-case hexadecimal."""
        assert self._sha256 is not None, "opened without checksum"
        return self._sha256.hexdigest()
