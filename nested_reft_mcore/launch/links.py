"""Do the processes of each group hear each other, within a deadline, and how fast?"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nested_reft_mcore.launch.context import ParallelContext, ParallelDimension, RankInfo
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.lifeline import Lifeline, within
from nested_reft_mcore.launch.meeting import Meeting, PreflightError, open_store

_BYTES_CPU, _BYTES_GPU = 1 << 20, 64 << 20
_ROUNDS = 3


@dataclass(frozen=True)
class Link:
    """What one process measured in one of its groups. Gigabytes (10^9 bytes) per second."""

    group: str
    size: int
    rank: int
    host: str
    all_reduce: float
    """2 (n - 1) / n times the tensor's bytes over the time, which does not depend on n."""
    send: float
    """To the next process of the group, while receiving from the one before."""


class LinkCheck:
    """A check that leaves no process waiting: at the deadline the job ends and says who is late."""

    def __init__(self, ranks: RankInfo, meeting: Meeting, line: Lifeline, seconds: float) -> None:
        self._ranks, self._meeting, self._line, self._seconds = ranks, meeting, line, seconds

    @contextmanager
    def __call__(self, name: str, members: Sequence[int]) -> Iterator[None]:
        """Run a block in which these ranks need each other; `name` says what for."""
        self._line.phase = f"preflight, {name}"
        self._meeting.store.set(f"links/{name}/{self._ranks.rank}", "begun")
        timer = threading.Timer(self._seconds, self._end, (name, members))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._line.phase = ""

    def _end(self, name: str, members: Sequence[int]) -> None:
        late: list[int] = []
        within(5.0, lambda: late.extend(self._late(name, members)))
        if late:
            what = f"has not begun it: {', '.join(map(self._name, late[:8]))}"
        else:
            what = f"all have begun it: {', '.join(map(self._name, members[:8]))}"
        text = f"preflight: {name}: not done within {self._seconds:g} s; {what}"
        self._line.fail(ExitCode.PREFLIGHT, text)
        os.write(2, f"{text}\n".encode())
        os._exit(ExitCode.PREFLIGHT)

    def _late(self, name: str, members: Sequence[int]) -> list[int]:
        # The main thread may wait in the store's other connection.
        store = open_store(self._ranks, 5.0)
        return [rank for rank in members if not store.check([f"links/{name}/{rank}"])]

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._meeting.hosts[rank]}"


def measure_links(context: ParallelContext, meeting: Meeting, check: LinkCheck) -> list[Link]:
    """All-reduce over, and a ring of messages through, each group; every process calls it.

    Returns:
        What every process measured in each of its groups.

    Raises:
        PreflightError: a wrong number came back.
    """
    mine: list[Link] = []
    for name, dimension in _groups(context).items():
        if dimension.size == 1:
            continue
        with check(f"all-reduce over the {name} group", dimension.ranks):
            all_reduce = _all_reduce(name, dimension, context)
        with check(f"messages through the {name} group", dimension.ranks):
            send = _ring(name, dimension, context, meeting.hosts)
        host = meeting.hosts[context.rank]
        mine.append(Link(name, dimension.size, context.rank, host, all_reduce, send))
    found: list[list[Link]] = [[] for _ in range(context.world_size)]
    with check("a gathering of all processes", range(context.world_size)):
        dist.all_gather_object(found, mine)
    return [link for links in found for link in links]


def _groups(context: ParallelContext) -> dict[str, ParallelDimension]:
    return {"tensor": context.tensor, "pipeline": context.pipeline, "data": context.data}


def _all_reduce(name: str, dimension: ParallelDimension, context: ParallelContext) -> float:
    values = _tensor(context)
    expected = sum(range(1, dimension.size + 1))

    def once() -> None:
        values.fill_(dimension.rank + 1)
        dist.all_reduce(values, group=dimension.group)

    seconds = _seconds(once, context)
    if not bool((values == expected).all()):
        raise PreflightError(
            f"links: all-reduce over the {name} group {list(dimension.ranks)}: expected "
            f"{expected}, got {values.min().item():g} to {values.max().item():g}"
        )
    share = 2 * (dimension.size - 1) / dimension.size
    return share * values.numel() * values.element_size() / seconds / 1e9


def _ring(
    name: str, dimension: ParallelDimension, context: ParallelContext, hosts: Sequence[str]
) -> float:
    following = dimension.ranks[(dimension.rank + 1) % dimension.size]
    former = dimension.ranks[dimension.rank - 1]
    outgoing, incoming = _tensor(context), _tensor(context)
    outgoing.fill_(context.rank)

    def once() -> None:
        operations = [
            dist.P2POp(dist.isend, outgoing, following, dimension.group),
            dist.P2POp(dist.irecv, incoming, former, dimension.group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    incoming.fill_(-1)
    seconds = _seconds(once, context)
    if not bool((incoming == former).all()):
        raise PreflightError(
            f"links: a message from rank {former} on {hosts[former]} to rank {context.rank} on "
            f"{hosts[context.rank]} ({name} group): expected {former}, got "
            f"{incoming.min().item():g} to {incoming.max().item():g}"
        )
    return incoming.numel() * incoming.element_size() / seconds / 1e9


def _tensor(context: ParallelContext) -> torch.Tensor:
    num_bytes = _BYTES_GPU if context.device.type == "cuda" else _BYTES_CPU
    return torch.empty(num_bytes // 4, dtype=torch.float32, device=context.device)


def _seconds(action: Callable[[], None], context: ParallelContext) -> float:
    """Of the fastest of some rounds; the one before them connects, and waits for others."""
    times: list[float] = []
    for _ in range(1 + _ROUNDS):
        started = time.perf_counter()
        action()
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return max(min(times[1:]), 1e-9)


def slowest(links: Sequence[Link]) -> dict[str, tuple[Link, Link]]:
    """By group, where the all-reduce and where sending was slowest."""
    found: dict[str, tuple[Link, Link]] = {}
    for name in dict.fromkeys(link.group for link in links):
        same = [link for link in links if link.group == name]
        found[name] = (
            min(same, key=lambda link: link.all_reduce),
            min(same, key=lambda link: link.send),
        )
    return found
