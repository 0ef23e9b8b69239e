"""Rank 0's hub: what it makes of deaths, silence, errors and strangers. Real sockets, no torch."""

from __future__ import annotations

import collections
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import nested_reft_mcore
from nested_reft_mcore.launch.hub import Hub, Member, waiting_lines
from nested_reft_mcore.launch.lifeline import Lifeline, Watchers
from nested_reft_mcore.launch.parent import LOCAL_MARKER
from nested_reft_mcore.launch.verdict import Trouble, Verdict, judge
from nested_reft_mcore.launch.whereabouts import error_whereabouts, main_thread_whereabouts
from nested_reft_mcore.launch.wire import LineClosed, Wire

TOKEN = "right"


class Watched:
    """A hub, and connections to it as other processes hold them."""

    def __init__(self, size: int, deadline: float) -> None:
        self.ended: queue.SimpleQueue[tuple[Verdict, list[str]]] = queue.SimpleQueue()
        self.left: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.hub = Hub(
            [f"node{rank}" for rank in range(size)],
            TOKEN,
            local_only=True,
            deadline_seconds=deadline,
            join_seconds=60,
            beat_seconds=0.05,
            last_words=lambda verdict, lines: self.ended.put((verdict, lines)),
            leave=self.left.put,
        )
        self.hub.start()
        self._stop = threading.Event()
        self.members = {rank: Peer(self.hub.port, rank, TOKEN, self._stop) for rank in range(size)}

    def end(self) -> tuple[Verdict, list[str]]:
        ended = self.ended.get(timeout=30)
        assert self.left.get(timeout=30) == ended[0].code
        return ended

    def close(self) -> None:
        self._stop.set()
        for member in self.members.values():
            member.socket.close()


class Peer:
    """What one process does: signs of life, and answers to a verdict."""

    def __init__(self, port: int, rank: int, token: str, stop: threading.Event) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.is_silent = False
        self._stop = stop
        self.say({"rank": rank, "token": token})
        for task in (self._beat, self._listen):
            threading.Thread(target=task, daemon=True).start()

    def say(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def trouble(self, code: int, text: str, *, is_consequence: bool = False) -> None:
        self.say({"trouble": {"code": code, "text": text, "is_consequence": is_consequence}})

    def _beat(self) -> None:
        while not self._stop.wait(0.05):
            if not self.is_silent:
                try:
                    self.say({"doing": "in step 3"})
                except OSError:
                    return

    def _listen(self) -> None:
        try:
            for line in self.socket.makefile():
                message = json.loads(line)
                if "beat" not in message:
                    self.told.put(message)
                if "verdict" in message and not self.is_silent:
                    self.say({"doing": "waiting in all_reduce", "waited": True})
        except (OSError, ValueError):
            return


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def start(size: int = 3, deadline: float = 30.0) -> Watched:
        made.append(Watched(size, deadline))
        return made[-1]

    yield start
    for watched in made:
        watched.close()


def test_a_death_is_the_cause_of_what_the_others_notice(watch) -> None:
    watched = watch()
    time.sleep(0.2)
    # The others' collectives fail first.
    watched.members[1].trouble(4, "closed by peer", is_consequence=True)
    time.sleep(0.2)
    watched.members[2].socket.shutdown(socket.SHUT_RDWR)
    verdict, lines = watched.end()
    assert (verdict.rank, verdict.host, verdict.code) == (2, "node2", 4)
    assert verdict.describe() == (
        "[rank 2 on node2] was lost: the process died while it was in step 3"
    )
    assert lines == ["  ranks 0-1 on node0, node1: waiting in all_reduce"]
    assert "verdict" in watched.members[1].told.get(timeout=30)
    assert watched.members[1].told.get(timeout=30) == {"end": True}


def test_silence_is_noticed_at_the_deadline(watch) -> None:
    watched = watch(deadline=1.5)
    time.sleep(2.0)
    assert watched.ended.empty()
    watched.members[1].is_silent = True
    verdict, lines = watched.end()
    assert (verdict.rank, verdict.code) == (1, 4)
    assert "no sign of life for" in verdict.text
    assert lines == ["  ranks 0, 2 on node0, node2: waiting in all_reduce"]


def test_what_one_process_says_of_itself_is_everybody_s_code(watch) -> None:
    watched = watch()
    watched.members[1].trouble(2, "error: shard 1 is broken")
    verdict, _ = watched.end()
    assert (verdict.code, verdict.describe()) == (2, "[rank 1 on node1] error: shard 1 is broken")


def test_what_all_find_is_told_without_a_rank(watch) -> None:
    watched = watch()
    for member in watched.members.values():
        member.trouble(2, "error: no such file")
    verdict, _ = watched.end()
    assert verdict.describe() == "error: no such file"


def test_who_says_goodbye_is_not_lost(watch) -> None:
    watched = watch()
    for member in watched.members.values():
        member.say({"bye": True})
        member.socket.shutdown(socket.SHUT_WR)
    began = time.monotonic()
    watched.hub.part(20)
    assert time.monotonic() - began < 10
    assert watched.ended.empty()


class Hasty(collections.deque[dict[str, Any]]):
    """What stands in it has been sent before whoever put it there goes on."""

    def append(self, message: dict[str, Any]) -> None:
        super().append(message)
        _eventually(lambda: not self)
        time.sleep(0.2)


@pytest.mark.parametrize("is_first", [True, False], ids=["rank 0 parts", "this one parts"])
def test_parting_takes_no_harm_where_the_thread_has_already_ended(watch, is_first: bool) -> None:
    watched = watch(2)
    line = Lifeline(1, "node1")
    with socket.create_server(("127.0.0.1", 0)) as pulse:
        where = Watchers(
            "127.0.0.1", watched.hub.port, TOKEN, pulse.getsockname()[1], "node0", 30.0, 0.05
        )
        line.join(where)
        if is_first:
            watched.hub.silence()
            _eventually(lambda: not line.is_joined)
        else:
            line._outbox = Hasty()
        assert line.is_joined is not is_first
        line.part()
    assert watched.ended.empty()


def _eventually(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_strangers_are_turned_away_and_disturb_nobody(watch) -> None:
    watched = watch()
    for greeting in (
        {"rank": 1, "token": "wrong"},
        {"rank": 9, "token": TOKEN},
        {"rank": "1", "token": TOKEN},
        ["no", "object"],
    ):
        with socket.create_connection(("127.0.0.1", watched.hub.port)) as stranger:
            stranger.sendall(json.dumps(greeting).encode() + b"\n")
            stranger.settimeout(30)
            while stranger.recv(1000):
                pass
    with socket.create_connection(("127.0.0.1", watched.hub.port)) as scanner:
        scanner.sendall(b"GET / HTTP/1.0\r\n\r\n")
        time.sleep(0.2)
    time.sleep(0.3)
    assert watched.ended.empty()
    watched.members[2].trouble(1, "still heard")
    assert watched.end()[0].text == "still heard"


def test_only_consequences_blame_whoever_gave_up() -> None:
    late = Trouble(3, "b", 4, "timed out", is_consequence=True)
    assert judge([late]).rank == 3
    error = Trouble(1, "a", 1, "ValueError: x")
    assert judge([late, error]) == Verdict(1, "a", 1, "ValueError: x")
    assert Verdict.from_json(judge([late, error]).to_json()) == judge([late, error])


def test_processes_that_do_the_same_share_a_line() -> None:
    members = [Member(rank, f"n{rank // 4}", doing="x") for rank in range(24)]
    members[5].doing = "y"
    assert waiting_lines(members) == [
        "  ranks 0-4, 6-23 on n0, n1, n2, n3, ...: x",
        "  rank 5 on n1: y",
    ]


def test_a_wire_takes_lines_in_any_pieces() -> None:
    left, right = socket.socketpair()
    wire = Wire(right)
    assert wire.receive() == []
    left.sendall(b'{"a": 1}\n{"b"')
    assert wire.receive() == [{"a": 1}]
    left.sendall(b": 2}\n")
    left.close()
    assert wire.receive() == [{"b": 2}]
    with pytest.raises(LineClosed):
        wire.receive()


def test_whereabouts_name_our_function_and_what_it_called() -> None:
    left, right = socket.socketpair()
    left.sendall(b"no json\n")
    with pytest.raises(LineClosed) as caught:
        Wire(right).receive()
    assert error_whereabouts(caught.value).startswith("receive (launch.wire:")
    found: queue.SimpleQueue[str] = queue.SimpleQueue()
    timer = threading.Timer(0.3, lambda: found.put(main_thread_whereabouts()))
    timer.start()
    # Nobody reads at the other end: our code waits there.
    left, right = socket.socketpair()
    wire = Wire(right)
    wire.send({"text": "x" * 900_000})
    wire.flush(seconds=1.5)
    assert found.get(timeout=30).startswith("flush (launch.wire:")
    left.close()


# Locks the interpreter for seconds: PyDLL, unlike CDLL, keeps the lock while C code runs.
BUSY = """
import ctypes, sys, time
ctypes.PyDLL(None).sleep(int(sys.argv[1]))
"""


def test_a_pulse_speaks_for_a_process_that_keeps_its_interpreter_lock(watch) -> None:
    """And does not for one that is stopped."""
    watched = watch(deadline=2.0)
    watched.members[1].is_silent = True
    code = (
        "import sys; from nested_reft_mcore.launch.pulse import start_pulse\n"
        f"start_pulse({TOKEN!r}, 0.1, '127.0.0.1', '{watched.hub.port}', '1')\n" + BUSY
    )
    root = str(Path(nested_reft_mcore.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    busy = subprocess.Popen([sys.executable, "-c", code, "600"], env=environment)
    try:
        time.sleep(7.0)
        assert watched.ended.empty()
        busy.send_signal(signal.SIGSTOP)
        verdict, _ = watched.end()
        assert (verdict.rank, verdict.code) == (1, 4)
        assert "no sign of life" in verdict.text
    finally:
        helpers = psutil.Process(busy.pid).children()
        busy.kill()
        busy.wait()
    assert helpers
    assert not psutil.wait_procs(helpers, timeout=10)[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_once_the_others_have_left(rank: int) -> None:
    """Nobody else may kill it: under srun each task is on its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    where = "'one-node'" if rank == 0 else f"'127.0.0.1', '{listener.getsockname()[1]}', '1'"
    code = (
        "import time; from nested_reft_mcore.launch.pulse import read_port, start_pulse\n"
        f"helper = start_pulse({TOKEN!r}, 0.1, {where})\n"
        f"print({rank} or read_port(helper), flush=True); time.sleep(600)\n"
    )
    # A bare start kills them itself, and torch's launcher leaves its variables where it was used.
    environment = {name: value for name, value in os.environ.items() if name != LOCAL_MARKER}
    root = str(Path(nested_reft_mcore.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        if rank == 0:
            other = socket.create_connection(("127.0.0.1", port))
            other.sendall(json.dumps({"rank": 1, "token": TOKEN}).encode())
        else:
            other, _ = listener.accept()
        assert other.recv(1000)
        process.send_signal(signal.SIGSTOP)
        other.close()
        assert process.wait(timeout=30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        listener.close()
