"""Why a job ends: what was noticed of its processes, and which of it came first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nested_reft_mcore.launch.exit_codes import ExitCode

VERDICT_KEY = "verdict"
"""Where the first process leaves the verdict in the store, for a launcher on the same machine."""


@dataclass(frozen=True)
class Trouble:
    """What one process has told of itself, or what was noticed of it."""

    rank: int
    host: str
    code: int
    text: str
    is_lost: bool = False
    """It did not say this itself: it died or is silent."""
    is_consequence: bool = False
    """It only noticed that it cannot reach another one."""


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, and with which exit code."""

    rank: int
    host: str
    code: int
    text: str
    is_shared: bool = False
    """All processes have found the same."""

    def describe(self) -> str:
        """The last thing that is printed."""
        if self.is_shared:
            return self.text
        return f"[rank {self.rank} on {self.host}] {self.text}"

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Verdict:
        """Back from the store."""
        return Verdict(**json.loads(text))


def judge(troubles: Sequence[Trouble]) -> Verdict:
    """The cause among what was noticed, in order of time: what follows from something else last.

    A death that is known is a cause; so is what a process says of itself.
    """
    causes = [one for one in troubles if not one.is_consequence]
    first = (causes or list(troubles))[0]
    same = {one.rank for one in causes if (one.code, one.text) == (first.code, first.text)}
    # What rank 0 has found as well is told as its own: that is where people look.
    shared = not first.is_lost and len(same) > 1 and 0 in same
    code = ExitCode.PEER_LOST if first.is_lost or first.is_consequence else first.code
    return Verdict(0 if shared else first.rank, first.host, int(code), first.text, shared)
