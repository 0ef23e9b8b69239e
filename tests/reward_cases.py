"""What tests of rewards share: processes that carry a mark, so that none can hide."""

import os
import time
from pathlib import Path

MARK = "NESTED_REFT_TEST_MARK"


def marked_processes(mark: str) -> set[int]:
    """Ids of the running processes, this one aside, whose environment holds the mark."""
    wanted = f"{MARK}={mark}".encode()
    found: set[int] = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            try:
                if wanted in (directory / "environ").read_bytes().split(b"\0"):
                    found.add(int(directory.name))
            except OSError:
                continue
    return found


def left_after(mark: str, seconds: float = 10.0) -> set[int]:
    """Marked processes that are still there after so long at most."""
    end = time.monotonic() + seconds
    while (left := marked_processes(mark)) and time.monotonic() < end:
        time.sleep(0.02)
    return left
