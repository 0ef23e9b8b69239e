"""Which changes would make a plan fit: tried one by one, then by two and three, by recomputing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checks import check_batches, check_for_training
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import config_from_dict
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.layout import Layout

_MOST_TOGETHER = 3
_MOST_SHOWN = 4
Judgement = tuple[bool, int]
"""Whether a configuration fits, and the bytes of its worst rank."""


@dataclass(frozen=True)
class Change:
    """Options with new values, by dotted key; more nodes are no option."""

    options: tuple[tuple[str, Any], ...]
    nodes: int | None = None

    def __str__(self) -> str:
        texts = [f"{key}={_written(value)}" for key, value in self.options]
        return " ".join(texts + ([f"--nodes {self.nodes}"] if self.nodes else []))

    @property
    def keys(self) -> set[str]:
        """What it changes."""
        return {key for key, _ in self.options} | ({"nodes"} if self.nodes else set())

    def joined(self, other: Change) -> Change:
        """Both."""
        return Change(self.options + other.options, self.nodes or other.nodes)


@dataclass(frozen=True)
class Advice:
    """A change, and what the plan says with it."""

    change: Change
    fits: bool
    worst_bytes: int


def advise(
    config: Config,
    architecture: ModelArchitecture,
    nodes: int,
    gpus_per_node: int,
    judge: Callable[[Config, int], Judgement],
) -> list[Advice]:
    """The smallest sets of changes with which `judge` says that it fits, four at most.

    Without any: the one set of three that comes closest. Changes that another check refuses are
    left out.
    """
    single = list(_changes(config, architecture, nodes, gpus_per_node))
    best: Advice | None = None
    for size in range(1, _MOST_TOGETHER + 1):
        found = []
        for changes in itertools.combinations(single, size):
            advice = _tried(config, architecture, changes, nodes, gpus_per_node, judge)
            if advice is None:
                continue
            if best is None or advice.worst_bytes < best.worst_bytes:
                best = advice
            if advice.fits:
                found.append(advice)
            if len(found) == _MOST_SHOWN:
                break
        if found:
            return found
    return [best] if best is not None else []


def changed(config: Config, change: Change) -> Config:
    """The configuration with a change. UserError where another check refuses it."""
    data = config.model_dump(mode="json")
    for key, value in change.options:
        section, field = key.split(".")
        data[section][field] = value
    return config_from_dict(data, "change")


def _tried(
    config: Config,
    architecture: ModelArchitecture,
    changes: Sequence[Change],
    nodes: int,
    gpus_per_node: int,
    judge: Callable[[Config, int], Judgement],
) -> Advice | None:
    joined = changes[0]
    for change in changes[1:]:
        if joined.keys & change.keys:
            return None
        joined = joined.joined(change)
    nodes = joined.nodes or nodes
    try:
        other = changed(config, joined)
        layout = Layout.of(architecture, other.parallel, nodes, gpus_per_node)
        check_for_training(other)
        check_batches(other, layout.data)
        fits, worst = judge(other, nodes)
    except UserError:
        return None
    return Advice(joined, fits, worst)


def _changes(
    config: Config, architecture: ModelArchitecture, nodes: int, gpus_per_node: int
) -> Iterator[Change]:
    """Candidates, those that cost least first."""
    model, parallel, train = config.model, config.parallel, config.train
    if not config.optimizer.use_distributed_optimizer:
        yield _one("optimizer.use_distributed_optimizer", True)
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield _one("parallel.sequence_parallel", True)
    if train.max_tokens_per_micro_batch is not None:
        longest = config.data.max_prompt_length + config.rollout.max_new_tokens
        if longest < train.max_tokens_per_micro_batch:
            yield _one("train.max_tokens_per_micro_batch", longest)
    else:
        for size in _halves(train.micro_batch_size):
            yield _one("train.micro_batch_size", size)
    if config.rollout.kv_cache_gb is not None:
        yield _one("rollout.kv_cache_gb", round(config.rollout.kv_cache_gb / 2, 2))
        yield _one("rollout.kv_cache_gb", None)
    yield _one("train.logprob_chunk_tokens", 128)
    if model.recompute_granularity != "full":
        yield Change(
            (
                ("model.recompute_granularity", "full"),
                ("model.recompute_method", "uniform"),
                ("model.recompute_num_layers", 1),
            )
        )
    if model.dtype == "float32":
        yield _one("model.dtype", "bfloat16")
    yield from _larger(
        "tensor_model_parallel_size", parallel.tensor_model_parallel_size, gpus_per_node
    )
    yield from _larger(
        "pipeline_model_parallel_size",
        parallel.pipeline_model_parallel_size,
        architecture.num_layers,
    )
    for factor in (2, 4):
        yield Change((), nodes * factor)


def _one(key: str, value: Any) -> Change:
    return Change(((key, value),))


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _larger(name: str, size: int, most: int) -> Iterator[Change]:
    """The next sizes up; those that do not fit the model are refused when they are tried."""
    for other in range(size + 1, min(most, 8 * size) + 1):
        options: list[tuple[str, Any]] = [(f"parallel.{name}", other)]
        yield Change(tuple(options))


def _written(value: Any) -> str:
    return json.dumps(value)
