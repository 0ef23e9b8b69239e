"""Wait for local workers: who left with which code, who is told to stop, and whose code counts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.parent import process_state
from nested_reft_mcore.launch.verdict import Verdict

_REPEAT_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """The exit code to return, and the rank that it comes from."""

    code: int
    rank: int


@dataclass
class WorkerWatch:
    """The workers: who runs, who left with which code, and what was done to those who linger."""

    pids: Mapping[int, int]
    grace_seconds: float
    codes: dict[int, int] = field(default_factory=dict)
    """Exit code by rank, in the order in which they left."""
    stopped_by_us: set[int] = field(default_factory=set)
    hung: list[int] = field(default_factory=list)
    """Those of them that somebody had stopped."""
    _deadline: float | None = None
    _terminated: bool = False
    _interrupts: int = 0
    _repeat_at: float | None = None

    @property
    def running(self) -> list[int]:
        """Ranks that have not left."""
        return [rank for rank in self.pids if rank not in self.codes]

    @property
    def done(self) -> bool:
        """Whether all have left."""
        return not self.running

    def handle(self, signals: Sequence[int]) -> None:
        """Pass signals on."""
        for number in signals:
            self._send(number)
            if number == signal.SIGUSR1:
                self._repeat_at = time.monotonic() + _REPEAT_STOP_SECONDS
            if number == signal.SIGINT:
                self._interrupts += 1
                self._start_clock()
                if self._interrupts > 1:
                    self._stop(signal.SIGKILL)

    def poll(self) -> None:
        """Note who left; remind of a stop; end the patience with the rest when it is due."""
        left: dict[int, int] = {}
        for rank in self.running:
            code = _exit_code(self.pids[rank])
            if code is not None:
                left[rank] = code
        self.codes |= left
        if any(left.values()):
            self._start_clock()
        now = time.monotonic()
        if self._repeat_at is not None and now >= self._repeat_at:
            # A worker that was still importing has missed it; for the others it changes nothing.
            self._send(signal.SIGUSR1)
            self._repeat_at = now + _REPEAT_STOP_SECONDS
        if ExitCode.PEER_LOST in self.codes.values():
            self._kill_stopped()
        if self._deadline is not None and now >= self._deadline and self.running:
            self._stop(signal.SIGKILL if self._terminated else signal.SIGTERM)
            self._terminated = True
            self._deadline = now + self.grace_seconds

    def outcome(self, verdict: Verdict | None = None) -> Outcome:
        """The answer for all, once all have left; `verdict` is what the workers have found."""
        if verdict is not None and not verdict.is_shared:
            own_code = 0 if verdict.rank in self.stopped_by_us else self.codes[verdict.rank]
            said_why = own_code not in (0, ExitCode.PEER_LOST) and own_code < 128
            return Outcome(own_code if said_why else verdict.code, verdict.rank)
        own = {rank: code for rank, code in self.codes.items() if rank not in self.stopped_by_us}
        failed = {rank: code for rank, code in own.items() if code not in (0, ExitCode.COME_BACK)}
        if failed:
            # Who lost a peer is a consequence, however early it left.
            causes = [rank for rank, code in failed.items() if code != ExitCode.PEER_LOST]
            if not causes and self.hung:
                return Outcome(int(ExitCode.PEER_LOST), self.hung[0])
            rank = (causes or list(failed))[0]
            code = failed[rank]
            if len(causes) < len(failed) and all(failed[cause] > 128 for cause in causes):
                code = int(ExitCode.PEER_LOST)
            # What all ranks refuse alike, rank 0 has told already.
            return Outcome(code, 0 if failed.get(0) == code == ExitCode.USER_ERROR else rank)
        if not own:
            return Outcome(128 + signal.SIGINT, min(self.codes))
        asked_back = [rank for rank, code in own.items() if code == ExitCode.COME_BACK]
        if not asked_back:
            return Outcome(ExitCode.OK, 0)
        if len(asked_back) == len(own):
            return Outcome(ExitCode.COME_BACK, asked_back[0])
        return Outcome(ExitCode.FAILURE, asked_back[0])

    def kill_groups(self) -> None:
        """Kill what is left of the workers' process groups: helpers, or everybody after an error.

        The leaders are not reaped yet, so the group numbers still belong to us.
        """
        for pid in self.pids.values():
            _signal_group(pid, signal.SIGKILL)

    def _kill_stopped(self) -> None:
        """A worker that the others have given up because it is stopped hears no other signal."""
        for rank in self.running:
            if process_state(self.pids[rank]) == "T":
                self.stopped_by_us.add(rank)
                if rank not in self.hung:
                    self.hung.append(rank)
                _signal_group(self.pids[rank], signal.SIGKILL)

    def _start_clock(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace_seconds

    def _send(self, number: int) -> None:
        """Signal the workers themselves; their helpers are theirs to tell."""
        for rank in self.running:
            os.kill(self.pids[rank], number)

    def _stop(self, number: int) -> None:
        self.stopped_by_us.update(self.running)
        for rank in self.running:
            _signal_group(self.pids[rank], number)


def _exit_code(pid: int) -> int | None:
    """The exit code of a child that has left, without reaping it; None while it runs."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
