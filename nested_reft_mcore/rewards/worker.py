"""A reward worker, run as `python -m nested_reft_mcore.rewards.worker LIFE`, a pipe's number.

Two processes: a supervisor, and the worker proper that it forks. The worker reads its settings
from standard input, says `{"ready": true, ...}`, or `{"failed": reason}` and leaves; then it reads
items with calls, and answers each call on standard output with `[values, error]`, in order, until
standard input closes. A call that takes longer than the deadline ends the worker by SIGALRM: the
kernel does it, so that code which never returns to the interpreter ends too.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards import messages, processes
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.registry import LoadedReward, load_reward
from nested_reft_mcore.rewards.supervisor import supervise

MAX_FILE_BYTES = 1 << 30
"""Longest file that a reward can write; beyond it raises OSError."""
MAX_ERROR_CHARACTERS = 200
"""So much of an exception's text is passed on."""


def main(arguments: list[str]) -> int:
    """Supervise a worker; returns the exit code."""
    return supervise(int(arguments[0]), serve)


def serve() -> int:
    """Serve until standard input closes; returns the exit code."""
    _let_alarms_through()
    requests, answers = _claim_pipes()
    settings = messages.read(requests)
    if settings is None:
        return 0
    _limit(settings["memory_bytes"])
    # Libraries warn here of what no user can change, once for every worker.
    logging.disable(logging.WARNING)
    try:
        rewards = [load_reward(entry["name"], entry["options"]) for entry in settings["functions"]]
    except UserError as error:
        _send(answers, {"failed": str(error)})
        return 1
    processes.adopt_orphans()
    # What a module starts when it is imported serves every call, and ends with the worker.
    servants = processes.children() if processes.has_children() else set()
    _send(
        answers, {"ready": True, "pid": os.getpid(), "scopes": [reward.scope for reward in rewards]}
    )
    while (request := messages.read(requests)) is not None:
        items = [RewardItem(**item) for item in request["items"]]
        for number, places in request["calls"]:
            signal.setitimer(signal.ITIMER_REAL, settings["deadline_seconds"])
            verdict = judge(rewards[number], [items[place] for place in places])
            if processes.has_children() and not processes.end_children(servants):
                return 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(answers, verdict)
    return 0


def judge(reward: LoadedReward, items: Sequence[RewardItem]) -> list[Any]:
    """`[values, None]`, or `[None, why]` if the reward raised or gave no finite numbers."""
    me = os.getpid()
    try:
        return [_values(reward, items), None]
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # it costs this call
        return [None, _describe(error)]
    finally:
        # A reward that forks returns twice; only the worker goes on.
        if os.getpid() != me:
            os._exit(0)


def _values(reward: LoadedReward, items: Sequence[RewardItem]) -> list[float]:
    if reward.scope == "item":
        values = [float(reward.function(item, **reward.options)) for item in items]
    else:
        values = [float(value) for value in reward.function(items, **reward.options)]
    if len(values) != len(items):
        raise ValueError(f"{len(values)} rewards for {len(items)} completions")
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"the reward is {value}")
    return values


def _describe(error: BaseException) -> str:
    """Kind and text of an exception, on one line, safe to print."""
    try:
        text = str(error)[:MAX_ERROR_CHARACTERS]
    except Exception:  # an exception of the user's own may not know how to tell itself
        text = "(it has no text)"
    text = " ".join(f"{type(error).__name__}: {text}".split())
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_ERROR_CHARACTERS]


def _let_alarms_through() -> None:
    """SIGALRM ends this process, whatever it inherited."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # A pool that died cannot read: writing to it ends the worker without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _limit(memory_bytes: int) -> None:
    """Cap memory and files, unless the system's own caps are lower, and leave no core files.

    An expression that explodes raises MemoryError, a file that grows too long raises OSError.
    """
    for kind, wanted in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, hard))


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
