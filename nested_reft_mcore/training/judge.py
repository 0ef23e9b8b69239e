"""Rewards of a batch: judged once per replica, known to all of its processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import RewardConfig
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rewards.base import RewardItem, RewardResult, Scope
from nested_reft_mcore.rewards.pool import RewardPool
from nested_reft_mcore.rollout.types import Rollout, RolloutBatch
from nested_reft_mcore.training.replicas import (
    add_up,
    broadcast_in_replica,
    gather_from_replicas,
    is_replica_writer,
)

_MAX_REASON, _MAX_FAILURES = 200, 10_000
"""Most characters of an error that are kept, and most errors between two steps."""
MAX_SAID = 10
"""So many kinds of failures are logged; all are counted."""
LEAST_FIRST = 8
"""Completions of the first batch: where all of so many fail, the reward itself is wrong."""

_log = logging.getLogger(__name__)


class Judge:
    """Verifiable rewards behind their worker processes. A context manager.

    Every process calls every method. One process of each replica has the workers; where a function
    judges whole batches, the first replica's judge for all.
    """

    def __init__(
        self,
        config: RewardConfig,
        context: ParallelContext,
        *,
        keep_components: bool = False,
    ) -> None:
        """`keep_components` is for who asks for `components`, where there are several functions."""
        self._context = context
        self.on_dead: Callable[[str], None] | None = None
        """Hears of it when workers that have worked cannot be started any more.

        The rewards of that call are zeros, which the caller has to throw away. Where it is None, or
        before the first judgement, it is an error.
        """
        self._functions = config.weighted
        self._has_judged = False
        self._is_first = True
        self._failures: dict[tuple[str, str], str] = {}
        self._keeps_components = keep_components and len(self._functions) > 1
        self._components: dict[tuple[str, str], tuple[float, ...]] = {}
        self._judges_batches = False
        self._said: Counter[str] = Counter()
        self._sums = [0.0] * len(self._functions)
        self._num_judged = 0
        self._pool: RewardPool | None = None
        if is_replica_writer(context):
            memory = int(config.memory_limit_gb * 1e9)
            self._pool = RewardPool(
                self._functions,
                config.num_workers,
                config.deadline_seconds,
                memory,
                config.start_timeout_seconds,
            )

    def __enter__(self) -> Judge:
        """Wait for the functions to be imported.

        Raises:
            UserError: one cannot be, or no worker starts; the same on all processes.
        """
        try:
            self._judges_batches = "batch" in self._learn_scopes()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()

    def __call__(self, rollouts: RolloutBatch) -> Tensor:
        """Rewards `[batch]` float32, in the order of `rollouts`, on every process.

        What the functions gave goes into `metrics`.
        """
        results = self.results(rollouts)
        for place in range(len(self._functions)):
            self._sums[place] += sum(result.components[place] for result in results)
        self._num_judged += len(results)
        if self._keeps_components:
            for rollout, result in zip(rollouts.rollouts, results, strict=True):
                self._components[rollout.prompt.text, rollout.text] = result.components
        return values_of(results)

    def results(self, rollouts: RolloutBatch) -> list[RewardResult]:
        """Verdicts in the order of `rollouts`, on every process; they go into no mean.

        Raises:
            UserError: the first batch failed whole, by exceptions or crashes: not its completions
                are at fault.
        """
        items = [_item(rollout) for rollout in rollouts.rollouts]
        results: list[RewardResult] = []
        if not self._judges_batches:
            if self._pool is not None:
                results = self._score(self._pool, items)
            results = broadcast_in_replica(results, self._context)
            self._refuse_if_all_failed(results)
            return results
        shares = gather_from_replicas(items, self._context)
        data = self._context.data
        if self._pool is not None and data.rank == 0:
            results = self._score(self._pool, [item for share in shares for item in share])
        results = broadcast_in_replica(results, self._context)
        results = gather_from_replicas(results, self._context)[0]
        start = sum(len(share) for share in shares[: data.rank])
        results = results[start : start + len(items)]
        self._refuse_if_all_failed(results)
        return results

    def metrics(self) -> dict[str, float]:
        """Items of the whole run that could not be judged; means since the last call, by function.

        Over all replicas. A function that failed counts as 0 in its mean.
        """
        pool = self._pool
        counts = {
            "reward/timeouts": float(pool.timeouts if pool else 0),
            "reward/errors": float(pool.errors if pool else 0),
            "num_judged": float(self._num_judged),
        }
        means = [f"reward/{function.metric_name}/mean" for function in self._functions]
        counts |= dict(zip(means, self._sums, strict=True))
        self._sums = [0.0] * len(self._functions)
        self._num_judged = 0
        total = add_up(
            gather_from_replicas(broadcast_in_replica(counts, self._context), self._context)
        )
        num_judged = total.pop("num_judged")
        for name in means:
            value = total.pop(name)
            if num_judged:
                total[name] = value / num_judged
        return total

    def _learn_scopes(self) -> tuple[Scope, ...]:
        """What each function judges, told by the workers of each replica's writer."""
        scopes: tuple[Scope, ...] = ()
        mistake = None
        if self._pool is not None:
            try:
                scopes = self._pool.scopes()
            except UserError as error:
                mistake = str(error)
        scopes, mistake = broadcast_in_replica((scopes, mistake), self._context)
        for found in gather_from_replicas(mistake, self._context):
            if found is not None:
                raise UserError(found)
        return scopes

    def _score(self, pool: RewardPool, items: Sequence[RewardItem]) -> list[RewardResult]:
        try:
            results = pool.score(items)
        except (UserError, OSError) as error:
            if self.on_dead is None or not self._has_judged:
                raise
            self.on_dead(f"rewards cannot be judged any more: {error}")
            nothing = (0.0,) * len(self._functions)
            return [RewardResult(0.0, components=nothing) for _ in items]
        self._has_judged = True
        self._tell_failures(results)
        for item, result in zip(items, results, strict=True):
            reason = failure_of(result)
            if reason is not None and len(self._failures) < _MAX_FAILURES:
                self._failures[item.prompt, item.completion] = reason
        return results

    def _refuse_if_all_failed(self, results: Sequence[RewardResult]) -> None:
        """Of the first batch, over all replicas; a deadline may be missed by all for once."""
        if not self._is_first:
            return
        self._is_first = False
        reasons = Counter(r.error for r in results if r.error is not None and not r.timed_out)
        shares = gather_from_replicas((len(results), reasons), self._context)
        total = sum(count for count, _ in shares)
        failed = sum((part for _, part in shares), Counter[str]())
        if total < LEAST_FIRST or failed.total() < total:
            return
        (reason, count), *others = failed.most_common()
        more = f" ({count} of them; {len(others)} other reasons)" if others else ""
        raise UserError(
            f"reward: none of the first {total} completions could be judged, so all would get "
            f"reward 0: {reason}{more}"
        )

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

    def components(self) -> dict[tuple[str, str], dict[str, float]]:
        """What each function gave since the last call, without weights, by prompt and completion.

        Empty where there is one function, whose value is the reward. Of all replicas, as
        `failures`; every process calls it.
        """
        mine, self._components = self._components, {}
        names = [function.metric_name for function in self._functions]
        return {
            key: dict(zip(names, values, strict=True))
            for part in gather_from_replicas(mine, self._context)
            for key, values in part.items()
        }

    def _tell_failures(self, results: Sequence[RewardResult]) -> None:
        """Log each new kind of failure, for a reward that silently gives 0 ruins a run."""
        failures = Counter(result.error for result in results if result.error is not None)
        for reason, count in failures.most_common():
            if reason not in self._said and len(self._said) < MAX_SAID:
                _log.warning(
                    "%d of %d completions could not be judged and got reward 0: %s",
                    count,
                    len(results),
                    reason,
                )
                self._said[reason] += count


def failure_of(result: RewardResult) -> str | None:
    """Why a completion could not be judged, `timeout` or the error's text; None where it was."""
    if result.error is None:
        return None
    return "timeout" if result.timed_out else result.error[:_MAX_REASON]


def values_of(results: Sequence[RewardResult]) -> Tensor:
    """Rewards `[batch]` float32."""
    return torch.tensor([result.value for result in results], dtype=torch.float32)


def _item(rollout: Rollout) -> RewardItem:
    prompt = rollout.prompt
    return RewardItem(
        prompt=prompt.text,
        completion=rollout.text,
        answer=prompt.answer or "",
        group=rollout.prompt_index,
        num_tokens=len(rollout.token_ids),
        is_truncated=rollout.is_truncated,
        dataset=prompt.dataset,
        question=prompt.question,
        labels=dict(prompt.labels),
    )
