"""Processes that a reward may leave behind: adopt them, find them, end them.

A process that has made itself a subreaper becomes the parent of every orphan among its descendants,
also of those that have left its session. So what it has to end are its children, until it has none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PATIENCE_SECONDS = 10.0
"""A reward that forks faster than its children can be ended is given up after so long."""


def adopt_orphans() -> None:
    """Become the parent of orphans among this process's descendants."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Be killed when the process `parent` ends, whatever ends it."""
    _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def has_children() -> bool:
    """Whether there are any; one system call."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children() -> set[int]:
    """Process ids of the children of this process, ended ones that nobody waited for included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= {int(pid) for pid in (task / "children").read_text().split()}
        except FileNotFoundError:
            # The thread has ended, or the kernel does not keep these lists.
            if task.exists():
                return _children_by_search()
    return found


def end_children(spared: Collection[int] = ()) -> bool:
    """Kill and collect every child and every descendant but those in `spared` and theirs.

    Returns:
        Whether all are gone.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while has_children() and (strays := children().difference(spared)):
        for pid in strays:
            # Not yet collected, so the number still belongs to the child.
            os.kill(pid, signal.SIGKILL)
        for pid in strays:
            _collect(pid)
        if time.monotonic() > end:
            return False
    return True


def _collect(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        # Somebody else in this process waited for it.
        return


def _children_by_search() -> set[int]:
    """Children, by the parent that every process of the machine names."""
    me = os.getpid()
    found: set[int] = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                stat = (directory / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == me:
                found.add(int(directory.name))
    return found


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
