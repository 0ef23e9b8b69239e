"""A reward worker, run as `python -m nested_reft_mcore.rewards.worker NAME DEADLINE_SECONDS`.

It says `{"ready": true}`, or `{"failed": reason}` and leaves; then it reads lists of
`[prompt, completion, answer]` from standard input and answers each item on standard output with
`[value, error]`, in order, until standard input closes. An item that takes longer than the deadline
ends the process by SIGALRM: the kernel does it, so that code which never returns to the interpreter
ends too, and so that an orphan ends even while it hangs.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards import messages
from nested_reft_mcore.rewards.base import RewardFunction, RewardItem
from nested_reft_mcore.rewards.registry import load_reward

MAX_MEMORY_BYTES = 4 << 30
"""Address space of a worker; an expression that explodes raises MemoryError."""
MAX_ERROR_CHARACTERS = 200
"""So much of an exception's text is passed on."""


def main(arguments: list[str]) -> int:
    """Serve until standard input closes; returns the exit code."""
    name, deadline_seconds = arguments[0], float(arguments[1])
    _leave_signals_to_the_pool()
    _limit_memory()
    requests, answers = _claim_pipes()
    # Libraries warn here of what no user can change, once for every worker.
    logging.disable(logging.WARNING)
    try:
        reward = load_reward(name)
    except UserError as error:
        _send(answers, {"failed": str(error)})
        return 1
    _send(answers, {"ready": True})
    while (items := messages.read(requests)) is not None:
        for item in items:
            signal.setitimer(signal.ITIMER_REAL, deadline_seconds)
            verdict = _judge(reward, RewardItem(*item))
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(answers, verdict)
    return 0


def _judge(reward: RewardFunction, item: RewardItem) -> list[Any]:
    """`[value, None]`, or `[0.0, why]` if the reward raised or gave no finite number."""
    try:
        value = float(reward(item))
    except Exception as error:  # a reward may raise anything; it costs this item
        return [0.0, f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]]
    return [value, None] if math.isfinite(value) else [0.0, f"the reward is {value}"]


def _leave_signals_to_the_pool() -> None:
    """Ignore what Slurm or a terminal sends to every process of a job; SIGALRM ends this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # A pool that died cannot read: writing to it ends the worker without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _limit_memory() -> None:
    """Cap the address space, unless the system's own cap is lower, and leave no core files."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _claim_pipes() -> tuple[BinaryIO, int]:
    """Take both pipes away from the reward, whose prints go to standard error instead."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.dup(1)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, answers


def _send(answers: int, message: Any) -> None:
    """Write one message whole."""
    data = memoryview(messages.encode(message))
    while data:
        data = data[os.write(answers, data) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
