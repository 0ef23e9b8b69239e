"""All processes find each other, or all learn who is missing; before any process group exists.

They meet in torch's key-value store: the one that torchrun or our own start holds, else rank 0's.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.launch import LaunchConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.launch.hub import Hub
from nested_reft_mcore.launch.lifeline import Lifeline, Watchers, within
from nested_reft_mcore.launch.pulse import read_port, start_pulse
from nested_reft_mcore.launch.ranks import node_name
from nested_reft_mcore.launch.verdict import VERDICT_KEY, Verdict

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

_SLACK_SECONDS = 15.0
"""Rank 0 speaks first: others wait so much longer for what it has to say."""
_FAREWELL_SECONDS = 5.0


class PreflightError(Exception):
    """A node or a process is bad; the message names it and the check."""

    def __init__(self, text: str, *, is_common: bool = False) -> None:
        super().__init__(text)
        self.is_common = is_common
        """All processes know it: rank 0 tells it for everybody."""


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a job have met."""

    store: Store
    hosts: tuple[str, ...]
    """Host name by rank."""


def meet(ranks: RankInfo, line: Lifeline, config: LaunchConfig) -> Meeting:
    """Find the other processes, and begin to watch over each other. Several processes only.

    Raises:
        PreflightError: on every process that is there, if some are not, or have refused to start.
        UserError: on every process, if all have refused.
    """
    store = open_store(ranks, config.join_deadline_seconds)
    hub = pulse = None
    if ranks.rank == 0:
        token = secrets.token_hex(16)
        muster = _gather(store, ranks, config.join_deadline_seconds)
        muster["token"] = token
        if not muster["problem"]:
            hub = _open_hub(ranks, line, config, muster, store)
            pulse = start_pulse(token, _beat_seconds(config), _nodes(ranks))
            muster["port"], muster["pulse_port"] = hub.port, read_port(pulse)
            muster["address"] = "127.0.0.1" if _on_one_node(ranks) else ranks.master_addr
        store.set("muster", json.dumps(muster))
    else:
        muster = _read(store, ranks, config.join_deadline_seconds)
    if muster["problem"]:
        _part(store, ranks)
        raise PreflightError(muster["problem"], is_common=True)
    hosts = tuple(muster["hosts"])
    watchers = Watchers(
        address="127.0.0.1" if ranks.rank == 0 else muster["address"],
        port=int(muster["port"]),
        token=muster["token"],
        pulse_port=int(muster["pulse_port"]),
        hub_host=hosts[0],
        deadline_seconds=config.peer_deadline_seconds,
        beat_seconds=_beat_seconds(config),
    )
    if hub is not None and pulse is not None:
        hub.start()
        line.host_hub(hub, pulse)
    try:
        line.join(watchers)
    except OSError as error:
        raise PreflightError(
            f"join: rank 0 on {hosts[0]} cannot be reached at {watchers.address}, port "
            f"{watchers.port}: {error}; look at the network and at MASTER_ADDR"
        ) from error
    return Meeting(store, hosts)


def refuse(ranks: RankInfo, error: UserError, seconds: float = 30.0) -> str | None:
    """Tell the others that this process found a mistake before the meeting.

    Returns:
        Nothing where all that are there have refused: then it is the user's mistake. Where others
        are well, this process's node is bad: what all of them have been told.
    """
    try:
        store = open_store(ranks, seconds)
        if ranks.rank == 0:
            muster = _gather(store, ranks, seconds, str(error))
            store.set("muster", json.dumps(muster))
        else:
            store.set(f"arrived/{ranks.rank}", _arrival(str(error)))
            muster = _read(store, ranks, seconds, has_arrived=True)
        _part(store, ranks)
    except PreflightError:
        return None
    return None if muster["all_refuse"] else muster["problem"]


def open_store(ranks: RankInfo, seconds: float) -> Store:
    """The job's store; torchrun's or our own launcher's, else the one that rank 0 opens.

    Raises:
        PreflightError: it is not to be reached within so many seconds.
    """
    import torch.distributed as dist

    is_held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            ranks.master_addr,
            ranks.master_port,
            is_master=ranks.rank == 0 and not is_held,
            timeout=datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        where = f"{ranks.master_addr}, port {ranks.master_port}"
        if ranks.rank == 0 and not is_held:
            what = f"rank 0 on {node_name(os.environ)} cannot listen on {where}"
        else:
            what = f"rank 0 was not found at {where} within {seconds:g} s"
        raise PreflightError(f"join: {what}: {str(error).splitlines()[0]}") from error
    # A torchrun that restarts its workers keeps the store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"nested_reft/{attempt}"
    return dist.PrefixStore(prefix, store)  # pyright: ignore[reportPrivateImportUsage]


def _beat_seconds(config: LaunchConfig) -> float:
    return min(1.0, config.peer_deadline_seconds / 5)


def _nodes(ranks: RankInfo) -> str:
    return "one-node" if _on_one_node(ranks) else "many-nodes"


def _on_one_node(ranks: RankInfo) -> bool:
    return ranks.local_world_size == ranks.world_size


def _arrival(problem: str = "") -> str:
    return json.dumps({"host": node_name(os.environ), "problem": problem})


def _gather(store: Store, ranks: RankInfo, seconds: float, problem: str = "") -> dict[str, Any]:
    """Rank 0: who is there, who is not, and who has refused."""
    store.set("arrived/0", _arrival(problem))
    keys = [f"arrived/{rank}" for rank in range(ranks.world_size)]
    with contextlib.suppress(RuntimeError):
        store.wait(keys, datetime.timedelta(seconds=seconds))
    arrived = {r: json.loads(store.get(key)) for r, key in enumerate(keys) if store.check([key])}
    missing = [rank for rank in range(ranks.world_size) if rank not in arrived]
    refused = {rank: told for rank, told in arrived.items() if told["problem"]}
    problems: list[str] = []
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        problems.append(
            f"join: {len(missing)} of {ranks.world_size} processes did not arrive within "
            f"{seconds:g} s: ranks {shown}"
        )
    problems += [
        f"start: rank {rank} on {told['host']}: {told['problem']}"
        for rank, told in list(refused.items())[:8]
    ]
    return {
        "hosts": [arrived[rank]["host"] if rank in arrived else "?" for rank in range(len(keys))],
        "problem": "\n".join(problems),
        "all_refuse": len(refused) == len(arrived),
    }


def _read(
    store: Store, ranks: RankInfo, seconds: float, *, has_arrived: bool = False
) -> dict[str, Any]:
    """The others: say that this process is there, and hear who else is."""
    try:
        if not has_arrived:
            store.set(f"arrived/{ranks.rank}", _arrival())
        store.wait(["muster"], datetime.timedelta(seconds=seconds + _SLACK_SECONDS))
        return json.loads(store.get("muster"))
    except RuntimeError as error:
        raise PreflightError(
            f"join: rank {ranks.rank} on {node_name(os.environ)} has heard nothing from rank 0 at "
            f"{ranks.master_addr} within {seconds:g} s"
        ) from error


def _part(store: Store, ranks: RankInfo) -> None:
    """Leave the meeting; rank 0, which may hold the store, last."""
    with contextlib.suppress(RuntimeError):
        if ranks.rank:
            store.add("left", 1)
            return
        end = time.monotonic() + _FAREWELL_SECONDS
        while store.add("left", 0) < ranks.world_size - 1 and time.monotonic() < end:
            time.sleep(0.05)


def _open_hub(
    ranks: RankInfo, line: Lifeline, config: LaunchConfig, muster: dict[str, Any], store: Store
) -> Hub:
    def last_words(verdict: Verdict, lines: list[str]) -> None:
        if ranks.launcher == "local":
            # For the launcher, which prints after everybody else.
            within(1.0, lambda: _leave_verdict(ranks, verdict))
        line.last_words(verdict, lines)

    return Hub(
        muster["hosts"],
        muster["token"],
        local_only=_on_one_node(ranks),
        deadline_seconds=config.peer_deadline_seconds,
        join_seconds=config.join_deadline_seconds,
        beat_seconds=_beat_seconds(config),
        last_words=last_words,
        leave=line.leave,
    )


def _leave_verdict(ranks: RankInfo, verdict: Verdict) -> None:
    """Through a connection of its own: the main thread may wait in the other one."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(
        ranks.master_addr,
        ranks.master_port,
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=1),
    )
    store.set(VERDICT_KEY, verdict.to_json())
