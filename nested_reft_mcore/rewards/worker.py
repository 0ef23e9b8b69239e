"""A reward worker, run as `python -m nested_reft_mcore.rewards.worker LIFE`, a pipe's number.

Three processes: a supervisor, which forks one that imports the rewards and warms up, which forks
the worker proper and forks it again when it is lost (`forking`; two processes where it cannot).

The worker reads its settings from standard input, says `{"ready": true, ...}`, or `{"failed":
reason}` and leaves; then it reads items with calls, says `{"taken": true}`, and answers each call
on standard output with `[values, error]`, in order, until standard input closes. A call that takes
longer than the deadline ends the worker by SIGALRM: the kernel does it, so that code which never
returns to the interpreter ends too. Of a worker that was lost `{"lost": exit code}` is said, before
the next one says that it is ready.
"""

from __future__ import annotations

import logging
import math
import os
import reprlib
import resource
import signal
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, BinaryIO

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards import messages, processes
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.forking import can_fork, serve_by_forks
from nested_reft_mcore.rewards.registry import LoadedReward, load_reward, warm_up
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
        rewards = _load(settings)
    except UserError as error:
        _send(answers, {"failed": str(error)})
        return 1
    forks = can_fork()
    ready = {"ready": True, "forks": forks, "scopes": [reward.scope for reward in rewards]}

    def judge_calls() -> int:
        processes.adopt_orphans()
        # What a module starts when it is imported serves every call, and ends with the worker.
        servants = processes.children() if processes.has_children() else set()
        _send(answers, ready | {"pid": os.getpid()})
        return _answer(requests, answers, rewards, settings["deadline_seconds"], servants)

    if not forks:
        return judge_calls()
    return serve_by_forks(
        requests.fileno(), judge_calls, lambda code: _send(answers, {"lost": code})
    )


def _load(settings: Mapping[str, Any]) -> list[LoadedReward]:
    """Import the rewards and warm them up, in the time that there is for it.

    Raises:
        UserError: one cannot be imported, or its import hangs; says where.
    """
    seconds = settings["start_seconds"]

    def give_up(number: int, frame: FrameType | None) -> None:
        place = "" if frame is None else f", in {frame.f_code.co_filename}:{frame.f_lineno}"
        raise TimeoutError(f"not done after reward.start_timeout_seconds={seconds:g}{place}")

    # Raised into whatever hangs; code that never returns to the interpreter is left to the pool.
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        loaded = [load_reward(entry["name"], entry["options"]) for entry in settings["functions"]]
        warm_up(loaded)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return loaded


def _answer(
    requests: BinaryIO,
    answers: int,
    rewards: Sequence[LoadedReward],
    deadline_seconds: float,
    servants: Collection[int],
) -> int:
    """Judge what is asked for, until nobody asks; returns the exit code."""
    while (request := messages.read(requests)) is not None:
        items = [RewardItem(**item) for item in request["items"]]
        # The pool's patience begins here: an item does not pay for the way to its worker.
        _send(answers, {"taken": True})
        for number, places in request["calls"]:
            signal.setitimer(signal.ITIMER_REAL, deadline_seconds)
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
        given = [reward.function(item, **reward.options) for item in items]
    else:
        returned = reward.function(items, **reward.options)
        if isinstance(returned, (str, bytes, Mapping)) or not isinstance(returned, Iterable):
            raise _wrong(returned, f"a sequence of {len(items)} numbers")
        given = list(returned)
    values = [_number(value) for value in given]
    if len(values) != len(items):
        raise ValueError(f"{len(values)} rewards for {len(items)} completions")
    return values


def _number(value: Any) -> float:
    """A finite float. TypeError for what only looks like a number, such as the text '1.0'."""
    is_real = hasattr(value, "__float__") or hasattr(value, "__index__")
    if not is_real or isinstance(value, (str, bytes, complex)):
        raise _wrong(value, "a real number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the reward is {number}")
    return number


def _wrong(value: object, expected: str) -> TypeError:
    shown = reprlib.repr(value)
    return TypeError(f"the reward returned {shown} ({type(value).__name__}); expected {expected}")


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
