"""A long list of lines in chunks: shared among replicas, gathered and written by rank 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.jsonl_writer import write_json_lines
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.training.replicas import gather_from_replicas, is_replica_writer

Value = TypeVar("Value")


def cut(count: int, size: int) -> Iterator[range]:
    """The places 0 to `count` in ranges of `size`, the last one shorter."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def my_part(chunk: range, context: ParallelContext) -> range:
    """What this process's replica takes of a chunk."""
    shard = shard_range(len(chunk), context.data.rank, context.data.size)
    return range(chunk.start + shard.start, chunk.start + shard.stop)


def gather_on_main(value: Value, context: ParallelContext) -> list[Value]:
    """The value of every replica on rank 0, in order; nothing elsewhere."""
    if not is_replica_writer(context):
        return []
    gathered = gather_from_replicas(value, context)
    return gathered if context.is_main else []


def write_from_main(
    output: str, lines: Iterator[Mapping[str, Any]], context: ParallelContext
) -> None:
    """Run `lines` on every process; rank 0 writes them."""
    if context.is_main:
        write_json_lines(output, lines)
    else:
        for _ in lines:
            raise RuntimeError("a process other than rank 0 has a line to write")


def json_numbers(logprobs: Sequence[float], source: str) -> list[float]:
    """Float32 numbers with the fewest digits that give the same bits back.

    Raises:
        UserError: one is not finite.
    """
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise UserError(
            f"{source}: a log-probability is {next(x for x in logprobs if not math.isfinite(x))}; "
            "expected finite numbers: are the model's weights finite?"
        )
    return [float(str(np.float32(logprob))) for logprob in logprobs]
