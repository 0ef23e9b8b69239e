"""Moments at which a test lets a process die, to prove that nothing is lost."""

from __future__ import annotations

import os
import signal
from typing import Literal

FAULT_VARIABLE = "NESTED_REFT_FAULT"
"""`MOMENT@STEP` or `MOMENT@STEP:RANK`; rank 0 where none is given. For tests only."""

Moment = Literal["mid-rollout", "mid-update", "before-manifest", "before-latest", "mid-removal"]
"""While generating; between two updates of a step; a checkpoint's files are written, but not its
manifest; it has its name, but `latest` names another; an old one has lost its name and is there.
"""


def fault_point(moment: Moment, step: int, rank: int) -> None:
    """Kill this very process, as `kill -9` does, if the environment asks for it here.

    `step` counts finished steps: for a save those that the checkpoint holds.
    """
    wanted = os.environ.get(FAULT_VARIABLE)
    if wanted and wanted in (f"{moment}@{step}:{rank}", f"{moment}@{step}" if rank == 0 else None):
        os.kill(os.getpid(), signal.SIGKILL)
