"""Tie a process's life to its parent's; imports nothing but the standard library."""

import ctypes
import os
import signal
import sys
from pathlib import Path

LOCAL_MARKER = "NESTED_REFT_LAUNCHER"
"""Set to `local` in workers that the bare start made."""

_PR_SET_PDEATHSIG = 1


def signal_at_parents_death(number: int) -> None:
    """Ask Linux to send this process `number` when its parent dies, however it dies.

    Survives an exec. Elsewhere than on Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        print(f"prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does: `T` is stopped, `Z` dead and not yet reaped.

    Empty where /proc does not tell.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The command's name, in brackets before it, may hold anything.
    return stat.rpartition(")")[2].split()[0]


def die_with_parent(parent: int) -> None:
    """Die by SIGKILL when the parent dies.

    Raises:
        SystemExit: the parent, whose process id this is, is gone already.
    """
    signal_at_parents_death(signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGKILL)
