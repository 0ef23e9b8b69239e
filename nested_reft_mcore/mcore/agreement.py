"""Work on several processes that ends well on all of them, or with the same error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import ParallelContext

Value = TypeVar("Value")


def on_every_process(work: Callable[[], Value], context: ParallelContext) -> list[Value]:
    """Do `work` on every process; returns every process's result, in order of rank.

    Results have to be small and picklable.

    Raises:
        UserError: on every process, as soon as one has raised it, so that nobody waits for a
            process that has left.
    """
    value: Value | None = None
    problem: str | None = None
    try:
        value = work()
    except UserError as error:
        problem = str(error)
    outcomes: list[Any] = [(value, problem)]
    if context.world_size > 1:
        outcomes *= context.world_size
        dist.all_gather_object(outcomes, (value, problem))
    # Several processes mostly find the same.
    problems = list(dict.fromkeys(problem for _, problem in outcomes if problem is not None))
    if problems:
        raise UserError("\n".join(problems))
    return [value for value, _ in outcomes]


def on_main_process(work: Callable[[], Value], context: ParallelContext) -> Value:
    """Do `work` on rank 0 only; its result or its UserError is every process's."""
    results = on_every_process(lambda: work() if context.is_main else None, context)
    return cast(Value, results[0])
