"""Watch over one worker: nothing that it starts outlives it, and it does not outlive the pool.

The supervisor forks the worker before anything of the reward is imported, so it is small and runs
no foreign code. It ends the worker when the pool closes its end of a pipe, which the kernel does
too where the pool is killed. However the worker ends, the supervisor ends what the reward has
forked, and then ends the same way, so that the pool sees the worker's own exit code or signal.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

from nested_reft_mcore.rewards.processes import adopt_orphans, end_children, end_with_parent

JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What Slurm or a terminal sends to every process of a job: the pool decides when workers end."""


def supervise(life: int, serve: Callable[[], int]) -> int:
    """Run `serve` in a forked process until it ends or the pipe `life` closes.

    Returns:
        The worker's exit code, in both processes. A worker killed by a signal takes the supervisor
        with it by the same signal.
    """
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    adopt_orphans()
    wakeup = _wake_up_on_child()
    me = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (life, wakeup):
            os.close(descriptor)
        end_with_parent(me)
        return serve()
    _let_go_of_the_pipes()
    status = _wait(worker, life, wakeup)
    end_children()
    if os.WIFSIGNALED(status):
        _die_by(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def _wake_up_on_child() -> int:
    """A pipe that becomes readable when a child has ended."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    return reader


def _let_go_of_the_pipes() -> None:
    """Leave requests and answers to the worker, so that their other ends notice its death."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _wait(worker: int, life: int, wakeup: int) -> int:
    """The worker's wait status, once it has ended or been ended."""
    poller = select.poll()
    poller.register(life, select.POLLIN)
    poller.register(wakeup, select.POLLIN)
    while True:
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            return status
        for descriptor, _ in poller.poll():
            if descriptor == life:
                os.kill(worker, signal.SIGKILL)
                return os.waitpid(worker, 0)[1]
            os.read(wakeup, 512)


def _die_by(number: int) -> None:
    """End as the worker did; an exit code where a signal does not end this process."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
