"""A helper process that says that its parent is alive, while the parent itself is too busy to.

The parent's threads need Python's interpreter lock, which C code may keep for long: an import from
a slow disk, say. This process needs nothing of the parent's: it asks the kernel whether the parent
is there, and not stopped. Run as `python -m nested_reft_mcore.launch.pulse PARENT SECONDS WHERE`
with the job's token on standard input. WHERE is an address, a port and a rank: it sends signs of
life to the hub there. In rank 0 it is `one-node` or `many-nodes`: it prints a port where it gives
them to whoever shows the token.

A parent that is stopped while the others leave is killed: it cannot leave by itself, and whoever
started the job would wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from nested_reft_mcore.launch.hub import listen
from nested_reft_mcore.launch.parent import LOCAL_MARKER, die_with_parent, process_state

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
BEAT = b'{"pulse": true}\n'
_LAST_CHANCE_SECONDS = 2.0


def start_pulse(token: str, beat_seconds: float, *where: str) -> subprocess.Popen[bytes]:
    """Start the helper of this process; `where` as above.

    It ends with this process. To be called in the main thread, with whose end it ends.
    """
    import nested_reft_mcore

    root = str(Path(nested_reft_mcore.__file__).parents[1])
    # A file in the working directory must not stand in for a module of the same name.
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}
    module = ("-S", "-m", "nested_reft_mcore.launch.pulse")
    process = subprocess.Popen(
        [sys.executable, *module, str(os.getpid()), repr(beat_seconds), *where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    process.stdin.write(token.encode() + b"\n")
    process.stdin.flush()
    return process


def read_port(process: subprocess.Popen[bytes]) -> int:
    """Where a helper without an address listens. Raises OSError if it did not start."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.strip().isdigit():
        raise OSError("the helper process that tells signs of life did not start")
    return int(line)


def main(arguments: list[str]) -> None:
    """Beat until the parent ends."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    parent, seconds = int(arguments[0]), float(arguments[1])
    die_with_parent(parent)
    token = sys.stdin.readline().strip()
    if len(arguments) == 3:
        _serve(listen(arguments[2] == "one-node"), token, seconds, parent)
        return
    address, port, rank = arguments[2:]
    with contextlib.suppress(OSError):
        hub = socket.create_connection((address, int(port)), 30)
        greeting = {"rank": int(rank), "token": token, "pulse": True}
        hub.sendall(json.dumps(greeting).encode() + b"\n")
        while not _has_closed(hub, seconds):
            if is_well(parent):
                hub.sendall(BEAT)
    while True:
        end_if_stopped(parent)
        time.sleep(seconds)


def is_well(parent: int) -> bool:
    """Whether the parent is there and runs, as far as the kernel tells."""
    if os.getppid() != parent:
        raise SystemExit
    return process_state(parent) not in ("T", "Z", "X")


def end_if_stopped(parent: int) -> None:
    """Kill the parent if it is stopped, and stays so; a bare start does that itself."""
    if is_well(parent) or LOCAL_MARKER in os.environ:
        return
    time.sleep(_LAST_CHANCE_SECONDS)
    if not is_well(parent):
        os.kill(parent, signal.SIGKILL)


def _has_closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side has closed a connection, after so long at most."""
    if not select.select([connection], [], [], seconds)[0]:
        return False
    try:
        return not connection.recv(4096)
    except OSError:
        return True


def _serve(listener: socket.socket, token: str, seconds: float, parent: int) -> None:
    """Give signs of life to whoever shows the token, this job's processes."""
    print(listener.getsockname()[1], flush=True)
    listeners: dict[socket.socket, int] = {}
    had_others = False
    strangers: list[socket.socket] = []
    next_beat = 0.0
    while True:
        pause = max(0.0, next_beat - time.monotonic())
        for ready in select.select([listener, *strangers, *listeners], [], [], pause)[0]:
            if ready is listener:
                with contextlib.suppress(OSError):
                    strangers.append(listener.accept()[0])
            elif ready in listeners:
                if _has_closed(ready, 0):
                    del listeners[ready]
            else:
                strangers.remove(ready)
                rank = _rank_of(ready, token)
                if rank is None:
                    ready.close()
                else:
                    listeners[ready] = rank
                    had_others = had_others or rank > 0
        if had_others and not any(listeners.values()):
            end_if_stopped(parent)
        if time.monotonic() >= next_beat:
            next_beat = time.monotonic() + seconds
            if is_well(parent):
                listeners = {one: rank for one, rank in listeners.items() if _send(one)}


def _rank_of(connection: socket.socket, token: str) -> int | None:
    """Who has connected; nothing for one that does not show the token."""
    connection.setblocking(False)
    try:
        greeting = json.loads(connection.recv(1000))
        return int(greeting["rank"]) if greeting["token"] == token else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _send(connection: socket.socket) -> bool:
    try:
        connection.send(BEAT)
    except BlockingIOError:
        return True
    except OSError:
        connection.close()
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
