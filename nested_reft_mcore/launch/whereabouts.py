"""Where in the code this process's main thread is, as one line for the others to read."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType

_PACKAGE = "nested_reft_mcore."
_NOT_OF_INTEREST = ("nested_reft_mcore.launch.lifeline", "nested_reft_mcore.cli.entry")


def main_thread_whereabouts() -> str:
    """The innermost call of ours and what it called: `all_reduce in any_process (training...:37)`.

    Empty where the main thread has ended, or is in none of our functions.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack: list[tuple[FrameType, int]] = []
    while frame is not None:
        stack.append((frame, frame.f_lineno))
        frame = frame.f_back
    return _describe(stack)


def error_whereabouts(error: BaseException) -> str:
    """The same of where an error arose."""
    return _describe(list(traceback.walk_tb(error.__traceback__))[::-1])


def _describe(stack: Sequence[tuple[FrameType, int]]) -> str:
    """A stack, innermost frame first."""
    inside: list[str] = []
    for frame, line in stack:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_PACKAGE) and module not in _NOT_OF_INTEREST:
            place = f"{frame.f_code.co_name} ({module.removeprefix(_PACKAGE)}:{line})"
            # torch wraps its collectives for its own logging.
            called = [name for name in inside[-2:] if name != "wrapper"]
            return f"{called[-1]} in {place}" if called else place
        inside.append(frame.f_code.co_name)
    return ""
