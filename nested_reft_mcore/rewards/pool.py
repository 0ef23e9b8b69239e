"""Judge completions in worker processes, each item within a deadline.

A reward that hangs, crashes or raises costs the item it was judging: value 0, counted. The worker
is replaced and the rest of the batch goes on. Workers end with the pool, also if it is killed: they
see their standard input close, at the latest after the deadline of the item in hand.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rewards.base import RewardItem, RewardResult
from nested_reft_mcore.rewards.worker_process import WorkerLost, WorkerProcess

CHUNKS_PER_WORKER = 4
"""A batch is cut so that workers which finish early can take more."""
MAX_CHUNK = 256
"""Most items in one message."""
MAX_START_FAILURES = 3
"""So many workers in a row that die before they are ready end the run."""


class RewardPool:
    """`num_workers` processes that judge with one reward. A context manager."""

    def __init__(self, name: str, num_workers: int = 1, deadline_seconds: float = 10.0) -> None:
        """Start the workers; `score` waits for them. `name` as `registry.load_reward` takes it."""
        if num_workers < 1 or deadline_seconds <= 0:
            raise ValueError(f"{num_workers} workers, {deadline_seconds} s: both must be positive")
        self._name = name
        self._deadline_seconds = deadline_seconds
        self._workers = [self._start() for _ in range(num_workers)]
        self.timeouts = 0
        """Items so far that took longer than the deadline."""
        self.errors = 0
        """Items so far whose judging raised or crashed."""

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the present workers."""
        return tuple(worker.pid for worker in self._workers)

    def close(self) -> None:
        """End every worker. The pool cannot be used afterwards."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Results in the order of `items`. UserError if the reward cannot be imported."""
        if not self._workers:
            raise RuntimeError("the reward pool is closed")
        size = -(-len(items) // (len(self._workers) * CHUNKS_PER_WORKER)) or 1
        size = min(size, MAX_CHUNK)
        chunks: queue.SimpleQueue[int] = queue.SimpleQueue()
        for start in range(0, len(items), size):
            chunks.put(start)
        results: dict[int, list[RewardResult]] = {}

        def work(slot: int) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    start = chunks.get_nowait()
                    results[start] = self._judge(slot, items[start : start + size])

        if len(self._workers) == 1:
            work(0)
        else:
            with ThreadPoolExecutor(len(self._workers)) as threads:
                list(threads.map(work, range(len(self._workers))))
        judged = [result for start in sorted(results) for result in results[start]]
        self.timeouts += sum(result.timed_out for result in judged)
        self.errors += sum(result.error is not None and not result.timed_out for result in judged)
        return judged

    def _start(self) -> WorkerProcess:
        """A new worker."""
        return WorkerProcess(self._name, self._deadline_seconds)

    def _replace(self, slot: int) -> None:
        """End the worker in a slot and start another."""
        self._workers[slot].close()
        self._workers[slot] = self._start()

    def _judge(self, slot: int, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Results of one chunk, with as many workers in the slot as it takes."""
        results: list[RewardResult] = []
        while len(results) < len(items):
            worker = self._ready_worker(slot)
            try:
                for result in worker.judge(items[len(results) :]):
                    results.append(result)
            except WorkerLost as lost:
                results.append(RewardResult(0.0, lost.reason, lost.timed_out))
                self._replace(slot)
        return results

    def _ready_worker(self, slot: int) -> WorkerProcess:
        """The worker in a slot, once it is ready. UserError if none ever is."""
        reason = ""
        for _ in range(MAX_START_FAILURES):
            if not self._workers[slot].is_alive and self._workers[slot].is_ready:
                self._replace(slot)
            try:
                self._workers[slot].wait_until_ready()
            except WorkerLost as lost:
                reason = lost.reason
                self._replace(slot)
            else:
                return self._workers[slot]
        raise UserError(
            f"reward.name {self._name!r}: {MAX_START_FAILURES} workers in a row did not start; the "
            f"last one: {reason}"
        )
