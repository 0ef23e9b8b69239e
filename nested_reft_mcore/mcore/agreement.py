"""What one process finds, known to all: nobody waits for a process that has given up."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nested_reft_mcore.checkpoints.staging import staged_directory, unwritable
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import ParallelContext


def barrier() -> None:
    """Wait for every process."""
    if dist.get_world_size() > 1:
        dist.barrier(
            device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None
        )


def from_last_stage(values: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Give every pipeline stage the last one's tensor; overwrites the others'."""
    if context.pipeline.group is not None:
        dist.broadcast(values, src=context.pipeline.ranks[-1], group=context.pipeline.group)
    return values


def gather_all(value: Any, context: ParallelContext) -> list[Any]:
    """The value of every process, in order of rank, on every process."""
    if context.world_size == 1:
        return [value]
    values: list[Any] = [None] * context.world_size
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], Any], context: ParallelContext) -> Any:
    """Do something on the first process; its result, or what it raises, is everybody's.

    The result has to be picklable.
    """
    box: list[Any] = [None, None]
    if context.is_main:
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error if context.world_size == 1 else _portable(error)
    if context.world_size > 1:
        dist.broadcast_object_list(box, src=0, device=context.device)
    result, error = box
    if error is not None:
        raise error
    return result


def on_all(action: Callable[[], Any], context: ParallelContext) -> list[Any]:
    """Do something on every process; the results of all, in order of rank, on every process.

    The results have to be small and picklable.

    Raises:
        UserError: on every process, where at least one has raised it; all that they have to say.
    """
    result: Any = None
    problem: str | None = None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    outcomes = gather_all((result, problem), context)
    # Several processes mostly find the same.
    problems = dict.fromkeys(problem for _, problem in outcomes if problem is not None)
    if problems:
        raise UserError("\n".join(problems))
    return [result for result, _ in outcomes]


def write_together(
    output: Path,
    context: ParallelContext,
    *,
    check: Callable[[], None],
    write: Callable[[Path], Any],
    finish: Callable[[Path, list[Any]], None],
) -> None:
    """Write one directory with all processes; it takes its name when everything is in it.

    Args:
        output: The directory's name.
        context: Every process calls this.
        check: Asked by the first process before anything is written.
        write: Called by every process with the directory; what it returns is small and picklable.
        finish: Called by the first process with the directory and what all have returned.

    Raises:
        UserError: on every process, whoever found it; nothing is left then.
    """
    try:
        with ExitStack() as stack:

            def begin() -> Path:
                check()
                return stack.enter_context(staged_directory(output))

            def write_mine() -> Any:
                try:
                    return write(directory)
                except OSError as error:
                    raise unwritable(output, error) from error

            directory: Path = on_main(begin, context)
            results = on_all(write_mine, context)

            def end() -> None:
                finish(directory, results)
                stack.close()

            on_main(end, context)
    except UserError:
        # A launcher may kill the first process, which tidies up, as soon as another has left.
        barrier()
        raise


def _portable(error: Exception) -> Exception:
    """The error, if another process can be told of it as it is; else its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")
