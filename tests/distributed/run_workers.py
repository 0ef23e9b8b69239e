"""Run a function in several real processes that can reach each other.

A process spends some seconds importing torch and Megatron: workers are forked from one that has
done it and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from nested_reft_mcore.launch.context import RankInfo

_WORKERS = multiprocessing.get_context("forkserver")
_WORKERS.set_forkserver_preload(["nested_reft_mcore.training.trainer"])


def run_workers(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Any]:
    """Call `function(ranks, *args)` in `world_size` new processes; returns what each returned.

    `ranks` is the process's RankInfo, ready for `initialize_parallel`. `function` and `args` have
    to be importable or picklable, and so does what comes back (no tensors on a device). The first
    process that fails, or the timeout, ends all of them and raises AssertionError.
    """
    port = _free_port()
    workers: dict[Connection, tuple[int, Any]] = {}
    for rank in range(world_size):
        receiver, sender = _WORKERS.Pipe(duplex=False)
        ranks = RankInfo(rank, world_size, rank, world_size, "127.0.0.1", port, "local")
        process = _WORKERS.Process(target=_work, args=(sender, function, ranks, args), daemon=True)
        process.start()
        sender.close()
        workers[receiver] = (rank, process)
    processes = [process for _, process in workers.values()]
    try:
        return _collect(workers, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _collect(
    workers: dict[Connection, tuple[int, Any]], deadline: float, timeout: float
) -> list[Any]:
    results: dict[int, Any] = {}
    while workers:
        ready = wait(list(workers), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(rank for rank, _ in workers.values())
            _end(workers)
            raise AssertionError(f"ranks {late} gave no answer within {timeout:.0f} seconds")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank, process = workers.pop(connection)
            try:
                succeeded, value = connection.recv()
            except EOFError:
                process.join()
                succeeded, value = False, f"it ended with exit code {process.exitcode}"
            if not succeeded:
                _end(workers)
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _end(workers: dict[Connection, tuple[int, Any]]) -> None:
    for _, process in workers.values():
        process.kill()


def _work(
    sender: Connection, function: Callable[..., Any], ranks: RankInfo, args: tuple[Any, ...]
) -> None:
    # Two processes on one machine with a thread per core each would wait for each other's cores.
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR=ranks.master_addr, MASTER_PORT=str(ranks.master_port))
    try:
        answer = (True, function(ranks, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
