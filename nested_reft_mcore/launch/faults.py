"""Moments at which a test lets a process die or be told to stop, to prove that nothing is lost."""

from __future__ import annotations

import os
import re
import signal
from typing import Literal

FAULT_VARIABLE = "NESTED_REFT_FAULT"
"""`MOMENT@STEP[:RANK[:SIGNAL]]`, as in `mid-rollout@3:1:SIGTERM`. For tests only."""

Moment = Literal[
    "mid-rollout",
    "mid-update",
    "mid-evaluation",
    "before-manifest",
    "before-latest",
    "mid-removal",
]
"""Three times while a step is worked on, `mid-update` between two of its updates; three times while
a checkpoint is saved: its files are written, but not its manifest; it has its name, but `latest`
names another; an old one has lost its name, but is still there.
"""
_FORM = re.compile(r"(?P<moment>[a-z-]+)@(?P<step>\d+)(:(?P<rank>\d+)(:(?P<signal>SIG\w+))?)?")


def fault_point(moment: Moment, step: int, rank: int) -> None:
    """Send this very process a signal, SIGKILL if none is named, if the environment asks for it.

    `step` counts finished steps; for a save, those that the checkpoint holds.

    Raises:
        ValueError: the variable is set, but not in its form.
    """
    wanted = os.environ.get(FAULT_VARIABLE)
    if not wanted:
        return
    match = _FORM.fullmatch(wanted)
    if match is None:
        raise ValueError(f"{FAULT_VARIABLE}={wanted}: expected MOMENT@STEP[:RANK[:SIGNAL]]")
    if (match["moment"], int(match["step"]), int(match["rank"] or 0)) == (moment, step, rank):
        os.kill(os.getpid(), signal.Signals[match["signal"] or "SIGKILL"])
