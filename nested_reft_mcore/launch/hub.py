"""Rank 0's side of the watch: who is alive, what each one does, and why all of them end.

Every process holds a connection to the hub and says every second what it does; the hub answers, so
that silence tells either side that the other is gone. A process that dies closes its connection,
which is known at once; one that is stopped, or whose node is gone, is silent.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nested_reft_mcore.launch.verdict import Trouble, Verdict, judge
from nested_reft_mcore.launch.wire import LineClosed, Wire

_GATHER_SECONDS = 2.0
"""All processes may have found the same: so long the first trouble waits for others."""
_CAUSE_SECONDS = 10.0
"""Who only lost touch with another waits so long for whoever left to be noticed."""
_ANSWER_SECONDS = 3.0
"""How long the others have to say what they were waiting for."""
_GREETING_SECONDS = 30.0


@dataclass
class Member:
    """One process, as the hub knows it."""

    rank: int
    host: str
    wire: Wire | None = None
    last_heard: float = 0.0
    doing: str = "it has not said anything yet"
    is_silent: bool = False
    has_left: bool = False
    """It said that it leaves, all being well."""
    waited: bool = False
    """It has answered the verdict."""


class Hub:
    """The watch over all processes, in a thread of rank 0's.

    At the end it calls, in its own thread, `last_words(verdict, lines)` with why and with what each
    process was doing, and once the others know, `leave(code)`.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        token: str,
        *,
        local_only: bool,
        deadline_seconds: float,
        join_seconds: float,
        beat_seconds: float,
        last_words: Callable[[Verdict, list[str]], None],
        leave: Callable[[int], None],
    ) -> None:
        self._members = [Member(rank, host) for rank, host in enumerate(hosts)]
        self._token = token
        self._deadline = deadline_seconds
        self._join_until = time.monotonic() + join_seconds
        self._beat_seconds = beat_seconds
        self._last_words = last_words
        self._leave = leave
        self._troubles: list[Trouble] = []
        self._trouble_since = 0.0
        self._strangers: dict[Wire, float] = {}
        self._pulses: dict[Wire, Member] = {}
        self._member_of: dict[Wire, Member] = {}
        self._listener = listen(local_only)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._parting_until: float | None = None
        self._silenced = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listener.getsockname()[1]

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def part(self, seconds: float) -> None:
        """All is well and this process leaves: wait for the others to say the same, so long."""
        self._parting_until = time.monotonic() + seconds
        self._thread.join(seconds + 2 * self._beat_seconds)

    def silence(self) -> None:
        """This process leaves at once, and nobody is to take it for lost."""
        self._parting_until = time.monotonic()
        self._silenced.wait(2 * self._beat_seconds)

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:
            os.write(2, f"the watch over processes ended:\n{traceback.format_exc()}".encode())
            # Nobody watches any more, which must not look as if this process had died.
            self._tell({"bye": True})

    def _watch(self) -> None:
        next_beat = 0.0
        while True:
            for key, _ in self._selector.select(self._pause(next_beat)):
                self._hear(key.fileobj)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._beat_seconds
                self._tell({"beat": True})
            if self._is_parted(now):
                self._tell({"bye": True})
                self._flush(1.0)
                self._silenced.set()
                return
            self._look_for_silence(now)
            verdict = self._verdict(now)
            if verdict is not None:
                self._finish(verdict)
                return

    def _pause(self, next_beat: float) -> float:
        pause = max(0.0, next_beat - time.monotonic())
        return min(pause, 0.05) if self._troubles or self._parting_until else min(pause, 0.5)

    def _is_parted(self, now: float) -> bool:
        if self._parting_until is None or self._troubles:
            return False
        return now >= self._parting_until or all(member.has_left for member in self._members)

    def _hear(self, source: Any) -> None:
        if source is self._listener:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                wire = Wire(connection)
                self._strangers[wire] = time.monotonic() + _GREETING_SECONDS
                self._selector.register(connection, selectors.EVENT_READ, wire)
            return
        wire = self._selector.get_key(source).data
        member = self._member_of.get(wire)
        try:
            for message in wire.receive():
                if wire in self._pulses:
                    self._pulses[wire].last_heard = time.monotonic()
                elif member is None:
                    member = self._greet(wire, message)
                else:
                    self._note(member, message)
        except LineClosed:
            self._selector.unregister(source)
            source.close()
            self._strangers.pop(wire, None)
            self._pulses.pop(wire, None)
            self._member_of.pop(wire, None)
            if member is not None:
                member.wire = None
                self._miss(member)

    def _greet(self, wire: Wire, message: dict[str, Any]) -> Member | None:
        """Who a new connection is, unless it only brings signs of life.

        Raises LineClosed for one that is none of the job's.
        """
        rank, token = message.get("rank"), str(message.get("token"))
        knows_us = hmac.compare_digest(token.encode(), self._token.encode())
        if not knows_us or not isinstance(rank, int) or rank not in range(len(self._members)):
            raise LineClosed("a stranger")
        del self._strangers[wire]
        member = self._members[rank]
        if "pulse" in message:
            self._pulses[wire] = member
            return None
        member.wire, member.last_heard = wire, time.monotonic()
        self._member_of[wire] = member
        return member

    def _note(self, member: Member, message: dict[str, Any]) -> None:
        member.last_heard = time.monotonic()
        if "doing" in message:
            member.doing = str(message["doing"])
        member.waited = member.waited or "waited" in message
        member.has_left = member.has_left or "bye" in message
        if "trouble" in message:
            told = message["trouble"]
            self._add(
                Trouble(
                    member.rank,
                    member.host,
                    int(told["code"]),
                    str(told["text"]),
                    is_consequence=bool(told["is_consequence"]),
                )
            )

    def _miss(self, member: Member) -> None:
        """A connection has ended."""
        told = any(trouble.rank == member.rank for trouble in self._troubles)
        if not member.has_left and not told:
            text = f"was lost: the process died while it was {member.doing}"
            self._add(Trouble(member.rank, member.host, 0, text, is_lost=True))

    def _look_for_silence(self, now: float) -> None:
        for wire, until in list(self._strangers.items()):
            if now > until:
                self._selector.unregister(wire)
                wire.close()
                del self._strangers[wire]
        for member in self._members:
            if member.has_left or member.is_silent:
                continue
            # Rank 0's silence is for the others to notice: here it has not had its turn.
            if member.rank and member.wire is not None and now - member.last_heard > self._deadline:
                member.is_silent = True
                text = (
                    f"was lost: no sign of life for {now - member.last_heard:.0f} s (stopped, or "
                    f"its node is gone); before that it was {member.doing}"
                )
                self._add(Trouble(member.rank, member.host, 0, text, is_lost=True))
            elif not member.last_heard and now > self._join_until:
                member.is_silent = True
                text = "was lost: it arrived, but has not joined the watch"
                self._add(Trouble(member.rank, member.host, 0, text, is_lost=True))

    def _add(self, trouble: Trouble) -> None:
        if not self._troubles:
            self._trouble_since = time.monotonic()
        self._troubles.append(trouble)

    def _verdict(self, now: float) -> Verdict | None:
        """Once there is one: after a moment in which the cause, or more of the same, may come."""
        if not self._troubles:
            return None
        waited = now - self._trouble_since
        everybody = len({trouble.rank for trouble in self._troubles}) == len(self._members)
        if all(trouble.is_consequence for trouble in self._troubles):
            due = waited > _CAUSE_SECONDS
        else:
            due = waited > _GATHER_SECONDS or everybody
        return judge(self._troubles) if due else None

    def _finish(self, verdict: Verdict) -> None:
        """Tell everybody, hear what they were waiting for, and end."""
        self._tell({"verdict": {"code": verdict.code, "text": verdict.describe()}})
        until = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < until:
            if all(m.waited or m.wire is None or m.is_silent for m in self._members):
                break
            for key, _ in self._selector.select(0.05):
                self._hear(key.fileobj)
        silent = {trouble.rank for trouble in self._troubles if trouble.is_lost}
        others = [member for member in self._members if member.rank not in silent]
        self._last_words(verdict, waiting_lines(others))
        self._tell({"end": True})
        self._flush(1.0)
        self._leave(verdict.code)

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self._members:
            if member.wire is not None:
                # Its end is noticed where its messages are read.
                with contextlib.suppress(LineClosed):
                    member.wire.send(message)

    def _flush(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for member in self._members:
            if member.wire is not None and not member.is_silent:
                with contextlib.suppress(LineClosed):
                    member.wire.flush(max(0.0, until - time.monotonic()))


def listen(local_only: bool) -> socket.socket:
    """A listening socket on a free port, for this machine or for all."""
    if local_only:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(("", 0), backlog=1024)


@dataclass
class _Waiting:
    ranks: list[int] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)


def waiting_lines(members: Sequence[Member]) -> list[str]:
    """What each process was doing; those that did the same share a line."""
    groups: dict[str, _Waiting] = {}
    for member in members:
        group = groups.setdefault(member.doing, _Waiting())
        group.ranks.append(member.rank)
        if member.host not in group.hosts:
            group.hosts.append(member.host)
    return [
        f"  rank{'s' if len(group.ranks) > 1 else ''} {_ranges(group.ranks)} on "
        f"{', '.join(group.hosts[:4])}{', ...' if len(group.hosts) > 4 else ''}: {doing}"
        for doing, group in groups.items()
    ]


def _ranges(ranks: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
