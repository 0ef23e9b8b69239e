"""Rewards of a batch: judged once per replica, known to all of its processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import RewardConfig
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.pool import RewardPool
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.replicas import (
    add_up,
    broadcast_in_replica,
    gather_from_replicas,
    is_replica_writer,
)

_MAX_REASON = 200
"""Most characters of an error that are kept."""


class Judge:
    """The verifiable reward behind its worker processes. A context manager."""

    def __init__(
        self,
        config: RewardConfig,
        context: ParallelContext,
        *,
        on_dead: Callable[[str], None] | None = None,
    ) -> None:
        """`on_dead` hears of it when workers that have worked cannot be started any more.

        The rewards of that call are zeros, which the caller has to throw away. Without `on_dead`,
        or before the first judgement, it is an error.
        """
        self._context = context
        self._on_dead = on_dead
        self._has_judged = False
        self._failures: dict[tuple[str, str], str] = {}
        self._pool: RewardPool | None = None
        if is_replica_writer(context):
            self._pool = RewardPool(config.name, config.num_workers, config.deadline_seconds)

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.close()

    def __call__(self, rollouts: RolloutBatch) -> Tensor:
        """Rewards `[batch]` float32, in the order of `rollouts`, on every process."""
        values: list[float] = []
        if self._pool is not None:
            items = [
                RewardItem(rollout.prompt.text, rollout.text, rollout.prompt.answer or "")
                for rollout in rollouts.rollouts
            ]
            values = self._score(self._pool, items)
        return torch.tensor(broadcast_in_replica(values, self._context), dtype=torch.float32)

    def _score(self, pool: RewardPool, items: Sequence[RewardItem]) -> list[float]:
        try:
            results = pool.score(items)
        except (UserError, OSError) as error:
            if self._on_dead is None or not self._has_judged:
                raise
            self._on_dead(f"rewards cannot be judged any more: {error}")
            return [0.0] * len(items)
        self._has_judged = True
        for item, result in zip(items, results, strict=True):
            if result.error is not None:
                reason = "timeout" if result.timed_out else result.error[:_MAX_REASON]
                self._failures[item.prompt, item.completion] = reason
        return [result.value for result in results]

    def failures(self) -> dict[tuple[str, str], str]:
        """Why items could not be judged since the last call, by prompt and completion.

        `timeout`, or the error's text. Of all replicas: groups may have moved since they were
        judged. Every process calls it.
        """
        mine, self._failures = self._failures, {}
        known: dict[tuple[str, str], str] = {}
        for part in gather_from_replicas(broadcast_in_replica(mine, self._context), self._context):
            known |= part
        return known

    def metrics(self) -> dict[str, float]:
        """Items of the whole run that could not be judged, over all replicas."""
        pool = self._pool
        counts = {
            "reward/timeouts": float(pool.timeouts if pool else 0),
            "reward/errors": float(pool.errors if pool else 0),
        }
        return add_up(
            gather_from_replicas(broadcast_in_replica(counts, self._context), self._context)
        )
