"""Replace a lost worker at once: a warm process forks the one that judges, and the next one.

Starting Python and importing sympy takes a second or more of a core. Where every second completion
ends its worker, that is most of a step, and what waits for it meets deadlines. A fork of a process
that has imported everything takes milliseconds. It is not safe where the reward's module has
started threads, which a fork lacks, or helper processes, which it would share: there the worker
judges itself, and the pool keeps spare ones.
"""

from __future__ import annotations

import gc
import os
import select
from collections.abc import Callable
from pathlib import Path

from nested_reft_mcore.rewards import processes


def can_fork() -> bool:
    """Whether this process has one thread and no children, so that a fork is all of it."""
    return len(list(Path("/proc/self/task").iterdir())) == 1 and not processes.has_children()


def serve_by_forks(
    requests: int, serve: Callable[[], int], tell_lost: Callable[[int], None]
) -> int:
    """Run `serve` in a forked process, and in another each time that one ends.

    `tell_lost` hears the exit code of each, negative for a signal, after what it had forked is
    gone. It ends when nobody can write to the pipe `requests` any more.

    Returns:
        The exit code, in both processes.
    """
    processes.adopt_orphans()
    # What is there now is never freed: a collection must not write to every page that is shared.
    gc.collect()
    gc.freeze()
    me = os.getpid()
    while not _is_closed(requests):
        worker = os.fork()
        if worker == 0:
            processes.end_with_parent(me)
            return serve()
        _, status = os.waitpid(worker, 0)
        if not processes.end_children():
            return 1
        tell_lost(os.waitstatus_to_exitcode(status))
    return 0


def _is_closed(pipe: int) -> bool:
    poller = select.poll()
    poller.register(pipe, 0)
    return bool(poller.poll(0))
