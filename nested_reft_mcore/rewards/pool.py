"""Judge completions in worker processes, each call within a deadline.

A reward that hangs, crashes or raises costs what it was judging: value 0, counted; a worker that
dies or stops by itself costs nothing. A worker is replaced at once, by a fork of a warm process or,
where a reward's module does not allow that, by a spare worker that was started before. The rest of
the batch goes on. Workers end with the pool, also if it is killed, and with them whatever a reward
has started.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import RewardFunctionConfig
from nested_reft_mcore.rewards.base import RewardItem, RewardResult, Scope
from nested_reft_mcore.rewards.calls import Chunk, plan_chunks
from nested_reft_mcore.rewards.worker_output import OutputBudget
from nested_reft_mcore.rewards.worker_process import WorkerLost, WorkerProcess

MAX_START_FAILURES = 3
"""So many workers in a row that die before they are ready end the run."""
DEFAULT_MEMORY_BYTES = 4 * 10**9
DEFAULT_START_SECONDS = 120.0
"""Sympy from a slow file system takes long."""
MAX_SPARES = 2
"""Of spare workers, where lost ones are not replaced by forks: each costs memory."""


class RewardPool:
    """`num_workers` processes that judge by a weighted sum of rewards. A context manager."""

    def __init__(
        self,
        functions: str | Sequence[RewardFunctionConfig],
        num_workers: int = 1,
        deadline_seconds: float = 10.0,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        start_seconds: float = DEFAULT_START_SECONDS,
    ) -> None:
        """Start the workers; `score` waits for them. A text is the name of the only reward."""
        if num_workers < 1 or deadline_seconds <= 0 or not functions:
            raise ValueError(
                f"{num_workers} workers, {deadline_seconds} s, {len(functions)} functions: all "
                "must be positive"
            )
        if isinstance(functions, str):
            functions = (RewardFunctionConfig(name=functions),)
        self._functions = tuple(functions)
        self._deadline_seconds = deadline_seconds
        self._memory_bytes = memory_bytes
        self._start_seconds = start_seconds
        self._budget = OutputBudget()
        self._workers: list[WorkerProcess] = []
        self._spares: list[WorkerProcess] = []
        self._spares_lock = threading.Lock()
        try:
            for _ in range(num_workers):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise
        self.timeouts = 0
        """Items so far that took longer than the deadline."""
        self.errors = 0
        """Items so far whose judging raised or crashed."""
        self.replacements = 0
        """Workers so far that took the place of a lost one."""

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

    @property
    def num_spares(self) -> int:
        """Spare workers that are ready, or on their way."""
        return len(self._spares)

    def close(self) -> None:
        """End every worker. The pool cannot be used afterwards."""
        for worker in (*self._workers, *self._spares):
            worker.close()
        self._workers, self._spares = [], []

    def scopes(self) -> tuple[Scope, ...]:
        """What one call of each function judges; waits for a worker to import them.

        Raises:
            UserError: a function cannot be imported, or no worker starts.
        """
        if not self._workers:
            raise RuntimeError("the reward pool is closed")
        scopes = self._ready_worker(0).scopes
        assert scopes is not None, "a ready worker has said them"
        return scopes

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Results in the order of `items`. UserError if a reward cannot be imported."""
        chunks = plan_chunks(items, self.scopes(), len(self._workers))
        board = _Board(self._functions, len(items))
        waiting: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        for chunk in chunks:
            waiting.put(chunk)

        def work(slot: int) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._judge(slot, items, waiting.get_nowait(), board)

        if len(self._workers) == 1:
            work(0)
        else:
            with ThreadPoolExecutor(len(self._workers)) as threads:
                list(threads.map(work, range(len(self._workers))))
        judged = board.results()
        self.timeouts += sum(result.timed_out for result in judged)
        self.errors += sum(result.error is not None and not result.timed_out for result in judged)
        return judged

    def _start(self) -> WorkerProcess:
        """A new worker."""
        return WorkerProcess(
            self._functions,
            self._deadline_seconds,
            self._memory_bytes,
            self._start_seconds,
            self._budget,
        )

    def _replace(self, slot: int) -> None:
        """End the worker in a slot and put a spare or new one there."""
        self._workers[slot].close()
        with self._spares_lock:
            spare = self._spares.pop(0) if self._spares else None
        self._workers[slot] = spare or self._start()

    def _keep_spares(self) -> None:
        """Start what is missing of the spare workers, in the background."""
        with self._spares_lock:
            for _ in range(min(MAX_SPARES, len(self._workers)) - len(self._spares)):
                self._spares.append(self._start())

    def _judge(self, slot: int, items: Sequence[RewardItem], chunk: Chunk, board: _Board) -> None:
        """Put the verdicts of one chunk on the board, with as many workers as it takes."""
        done = deaths_before_begin = 0
        while done < len(chunk.calls):
            rest = Chunk(chunk.calls[done:])
            worker = self._ready_worker(slot)
            try:
                for values, error in worker.judge(items, rest.items, rest.calls):
                    call = chunk.calls[done]
                    done += 1
                    if values is None:
                        board.fail(call.function, call.items, error or "no reason given", False)
                    else:
                        board.set(call.function, call.items, values)
            except WorkerLost as lost:
                with self._spares_lock:
                    self.replacements += 1
                if not worker.can_go_on:
                    self._replace(slot)
                # One that died of itself costs no completion, unless every one dies of the items.
                deaths_before_begin += not lost.had_begun
                if lost.had_begun or deaths_before_begin == MAX_START_FAILURES:
                    call = chunk.calls[done]
                    done += 1
                    board.fail(call.function, call.items, lost.reason, lost.timed_out)

    def _ready_worker(self, slot: int) -> WorkerProcess:
        """The worker in a slot, once it is ready. UserError if none ever is."""
        names = ", ".join(repr(function.name) for function in self._functions)
        reason = ""
        for _ in range(MAX_START_FAILURES):
            if self._workers[slot].scopes is not None and not self._workers[slot].can_go_on:
                self._replace(slot)
            try:
                self._workers[slot].wait_until_ready()
            except WorkerLost as lost:
                reason = lost.reason
                if lost.timed_out:
                    raise UserError(
                        f"reward {names}: a worker was not ready after {self._start_seconds:g} s "
                        "(reward.start_timeout_seconds): its module hangs while it is imported"
                    ) from None
                self._replace(slot)
            else:
                if not self._workers[slot].forks:
                    self._keep_spares()
                return self._workers[slot]
        raise UserError(
            f"reward {names}: {MAX_START_FAILURES} workers in a row did not start; the last one: "
            f"{reason}"
        )


@dataclass(frozen=True)
class _Failure:
    reason: str
    timed_out: bool


class _Board:
    """Verdicts of a batch as they come in, from several threads that write different places."""

    def __init__(self, functions: Sequence[RewardFunctionConfig], num_items: int) -> None:
        self._functions = functions
        self._values = [[0.0] * num_items for _ in functions]
        self._failures: list[list[_Failure]] = [[] for _ in range(num_items)]

    def set(self, function: int, items: Sequence[int], values: Sequence[float]) -> None:
        """What a call gave."""
        for place, value in zip(items, values, strict=True):
            self._values[function][place] = value

    def fail(self, function: int, items: Sequence[int], reason: str, timed_out: bool) -> None:
        """A call gave nothing."""
        if len(self._functions) > 1:
            reason = f"{self._functions[function].metric_name}: {reason}"
        for place in items:
            self._failures[place].append(_Failure(reason, timed_out))

    def results(self) -> list[RewardResult]:
        """Weighted sums, and 0 where anything failed."""
        weights = [function.weight for function in self._functions]
        results: list[RewardResult] = []
        for place, failures in enumerate(self._failures):
            components = tuple(values[place] for values in self._values)
            if failures:
                results.append(
                    RewardResult(
                        0.0,
                        "; ".join(failure.reason for failure in failures),
                        any(failure.timed_out for failure in failures),
                        components,
                    )
                )
            else:
                value = sum(w * component for w, component in zip(weights, components, strict=True))
                results.append(RewardResult(value, components=components))
        return results
