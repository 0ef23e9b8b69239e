"""Each process's side of the watch: it says what it does, and leaves when another one is gone.

A thread does this, so that it works while the main thread waits in a collective that nobody will
ever answer: torch lets go of the interpreter lock there. While C code keeps that lock, a helper
process gives the signs of life (`pulse`).
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.hub import Hub
from nested_reft_mcore.launch.pulse import start_pulse
from nested_reft_mcore.launch.verdict import Verdict
from nested_reft_mcore.launch.whereabouts import error_whereabouts, main_thread_whereabouts
from nested_reft_mcore.launch.wire import LineClosed, Wire

_LAST_WORDS_SECONDS = 10.0
_END_SECONDS = 15.0
"""After a verdict the hub hears everybody, and speaks its last words; then it says `end`."""
_PARTING_SECONDS = 10.0


@dataclass(frozen=True)
class Watchers:
    """Where the hub is, and how patient everybody is."""

    address: str
    port: int
    token: str
    pulse_port: int
    """Where rank 0's helper gives its signs of life."""
    hub_host: str
    deadline_seconds: float
    beat_seconds: float
    """Between two signs of life."""


class Lifeline:
    """What this process tells the others, and hears of them. Until `join` it only takes notes."""

    def __init__(self, rank: int = 0, host: str = "") -> None:
        self.step: int | None = None
        """The step under way, as its metrics will name it."""
        self.phase = ""
        """What of it: a name of `timing_s/`."""
        self.on_lost_peer: Callable[[], None] | None = None
        """The last thing that rank 0 does before it leaves because another process is lost; all do
        it where rank 0 is. Called in another thread than the main one, with ten seconds."""
        self.note: Callable[[str], None] = lambda text: None
        """Takes lines for this process's log file."""
        self._rank, self._host = rank, host
        self._hub: Hub | None = None
        self._pulse: subprocess.Popen[bytes] | None = None
        self._outbox: collections.deque[dict[str, Any]] = collections.deque()
        self._sent = threading.Event()
        self._thread: threading.Thread | None = None
        self._waker: socket.socket | None = None
        self._parted = False
        self._failed_at = ""

    @property
    def is_joined(self) -> bool:
        """Whether others watch over this process, and it over them."""
        return self._thread is not None and self._thread.is_alive() and not self._parted

    def doing(self) -> str:
        """What this process does just now, in words."""
        when = "" if self.step is None else f"in step {self.step}"
        phase = f"`{self.phase}`" if self.phase else ""
        head = ", ".join(part for part in (when, phase) if part)
        place = self._failed_at or main_thread_whereabouts()
        return ": ".join(part for part in (head, place) if part) or "at its start"

    def host_hub(self, hub: Hub, pulse: subprocess.Popen[bytes]) -> None:
        """Rank 0: the hub is in this process, which the helper belongs to."""
        self._hub, self._pulse = hub, pulse

    def join(self, watchers: Watchers) -> None:
        """Connect to the hub and begin to watch. Raises OSError where it cannot be reached."""
        # The hub opened before anybody learnt of it: it is there, or nobody can reach it.
        wires: list[Wire] = []
        for port in (watchers.port, watchers.pulse_port):
            wires.append(Wire(socket.create_connection((watchers.address, port), timeout=30)))
            wires[-1].send({"rank": self._rank, "token": watchers.token})
        if self._hub is None:
            where = (watchers.address, str(watchers.port), str(self._rank))
            self._pulse = start_pulse(watchers.token, watchers.beat_seconds, *where)
        reader, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._thread = threading.Thread(
            target=self._guarded, args=(wires, reader, watchers), name="lifeline", daemon=True
        )
        self._thread.start()

    def fail(
        self,
        code: int,
        text: str,
        *,
        error: BaseException | None = None,
        is_consequence: bool = False,
    ) -> None:
        """Tell the others why this process cannot go on; all of them leave, this one included.

        Comes back only where nobody watches.

        Args:
            code: What the job is to leave with.
            text: The reason, for people.
            error: Where it arose is what this process was doing.
            is_consequence: This process has only lost touch with another one.
        """
        if not self.is_joined:
            return
        self._failed_at = error_whereabouts(error) if error is not None else ""
        told = {"code": int(code), "text": text, "is_consequence": is_consequence}
        self._post({"trouble": told})
        assert self._thread is not None
        # The hub answers within seconds; a hub that is gone is noticed, too.
        self._thread.join()

    def part(self) -> None:
        """All is well and this process leaves; rank 0 waits a while for the others to do so."""
        self.farewell()
        if self._hub is not None:
            self._hub.part(_PARTING_SECONDS)
        if self._pulse is not None:
            self._pulse.kill()
            self._pulse.wait()

    def farewell(self) -> None:
        """This process leaves at once; nobody is to take it for lost."""
        if not self.is_joined:
            return
        self._post({"bye": True})
        self._parted = True
        self._sent.wait(2.0)

    def silence(self) -> None:
        """`farewell`, of rank 0's hub as well."""
        self.farewell()
        if self._hub is not None:
            self._hub.silence()

    def _post(self, message: dict[str, Any]) -> None:
        self._sent.clear()
        self._outbox.append(message)
        if self._waker is not None:
            # A thread that has just sent this by itself, or has heard rank 0 part, does not listen.
            with contextlib.suppress(BrokenPipeError):
                self._waker.send(b"\0")

    def _guarded(self, wires: list[Wire], reader: socket.socket, watchers: Watchers) -> None:
        try:
            _Watch(self, wires, reader, watchers).run()
        except Exception:
            # Without a watch the run is as good as it was before there was one.
            os.write(2, f"the watch over other processes ended:\n{traceback.format_exc()}".encode())

    def _take(self) -> dict[str, Any] | None:
        try:
            return self._outbox.popleft()
        except IndexError:
            return None

    def last_words(self, verdict: Verdict, lines: list[str]) -> None:
        """Say why the job ends, the cause last; ask for another start where that is wanted."""
        if verdict.code == ExitCode.PEER_LOST and self.on_lost_peer is not None:
            within(_LAST_WORDS_SECONDS, self.on_lost_peer)
        text = f"{verdict.describe()}\n"
        if verdict.code == ExitCode.PEER_LOST:
            # Who waited for whom tells something only where a process did not say why it left.
            text = "".join(f"{line}\n" for line in ("the processes were:", *lines)) + text
        within(2.0, lambda: self.note(text))
        within(2.0, lambda: _print(text))

    def leave(self, code: int) -> None:
        """End this process, whatever its main thread does."""
        os._exit(code)

    @property
    def rank(self) -> int:
        """Of this process."""
        return self._rank

    @property
    def host(self) -> str:
        """Of this process."""
        return self._host

    @property
    def has_hub(self) -> bool:
        """Whether the hub is in this process, and ends it."""
        return self._hub is not None


class _Watch:
    """The thread of one process."""

    def __init__(
        self, line: Lifeline, wires: list[Wire], reader: socket.socket, watchers: Watchers
    ) -> None:
        self._line, self._reader, self._watchers = line, reader, watchers
        self._wire = wires[0]
        self._pulse: Wire | None = wires[1]
        self._verdict: tuple[int, str] | None = None
        self._end_by: float | None = None
        self._is_over = False

    def run(self) -> None:
        """Say and hear, until this process parts or the job ends."""
        last_heard, next_beat = time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            try:
                if now >= next_beat:
                    next_beat = now + self._watchers.beat_seconds
                    self._wire.send({"doing": self._line.doing()})
                while (message := self._line._take()) is not None:
                    self._wire.send(message)
                    if "bye" in message:
                        self._wire.flush(1.0)
                        self._line._sent.set()
                        return
                self._wire.flush()
                if self._listen(max(0.0, next_beat - now)):
                    last_heard = time.monotonic()
            except LineClosed:
                self._lose_hub("the process died")
                return
            if self._is_over:
                return
            now = time.monotonic()
            if self._end_by is not None and now > self._end_by:
                self._leave()
            silence = now - last_heard
            if silence > self._watchers.deadline_seconds:
                self._lose_hub(
                    f"no sign of life for {silence:.0f} s (stopped, or its node is gone)"
                )
                return

    def _listen(self, seconds: float) -> bool:
        """Wait for what comes; whether rank 0 has given a sign of life. Raises LineClosed."""
        sources = [self._wire, self._reader, *([self._pulse] if self._pulse else [])]
        readable, _, _ = select.select(sources, [], [], seconds)
        if self._reader in readable:
            self._reader.recv(4096)
        if self._pulse is not None and self._pulse in readable:
            try:
                self._pulse.receive()
            except LineClosed:
                # The helper alone, or all of rank 0: that is seen on the other wire.
                self._pulse = None
        if self._wire in readable:
            for message in self._wire.receive():
                self._hear(message)
        return self._wire in readable or (self._pulse is not None and self._pulse in readable)

    def _hear(self, message: dict[str, Any]) -> None:
        if "verdict" in message:
            told = message["verdict"]
            self._verdict = (int(told["code"]), str(told["text"]))
            self._end_by = time.monotonic() + _END_SECONDS
            self._wire.send({"doing": self._line.doing(), "waited": True})
        elif "end" in message:
            self._leave()
        elif "bye" in message:
            # Rank 0 has done all its work; what is left here needs nobody.
            self._is_over = True

    def _leave(self) -> None:
        if self._verdict is None or self._line.has_hub:
            return
        code, text = self._verdict
        doing = self._line.doing()
        within(2.0, lambda: self._line.note(f"leaving with {code}, was {doing}\n{text}\n"))
        self._line.leave(code)

    def _lose_hub(self, how: str) -> None:
        """Rank 0 is gone: everybody ends by himself."""
        if self._line.has_hub:
            return
        if self._verdict is not None:
            self._leave()
        text = f"was lost: {how}"
        verdict = Verdict(0, self._watchers.hub_host, int(ExitCode.PEER_LOST), text)
        lines = [f"  rank {self._line.rank} on {self._line.host}: {self._line.doing()}"]
        self._line.last_words(verdict, lines)
        self._line.leave(verdict.code)


def within(seconds: float, action: Callable[[], object]) -> None:
    """Do something, but wait no longer: a disk or a lock may not answer."""
    thread = threading.Thread(target=_try, args=(action,), daemon=True)
    thread.start()
    thread.join(seconds)


def _try(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception:
        os.write(2, traceback.format_exc().encode())


def _print(text: str) -> None:
    # The main thread may hold the lock of sys.stderr for ever.
    os.write(2, text.encode())
