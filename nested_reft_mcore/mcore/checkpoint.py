"""Megatron's distributed checkpoints, which appear whole or not at all and load at any layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from nested_reft_mcore.checkpoints.manifest import Level, verify
from nested_reft_mcore.checkpoints.publish import partial_directory
from nested_reft_mcore.config.checkpoint_layout import (
    STATE_FILE,
    read_checkpoint_architecture,
    resolve_checkpoint,
    write_architecture,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import gather_all, on_main
from nested_reft_mcore.mcore.checkpoint_safety import read_index
from nested_reft_mcore.mcore.checkpoint_writer import CheckpointWriter
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer

_EXTRA_STATE = "._extra_state"


def begin_checkpoint(
    policy: Policy,
    partial: Path,
    *,
    optimizer: PolicyOptimizer | None = None,
    state: dict[str, Any] | None = None,
    add_files: Callable[[Path], None] | None = None,
    snapshot: bool = False,
) -> CheckpointWriter:
    """Prepare a checkpoint in `partial`; the caller lets it be written and published.

    Every process calls it.

    Args:
        policy: At full depth.
        partial: Is emptied.
        optimizer: Left out where only weights are wanted.
        state: JSON values that come back from `load_checkpoint`.
        add_files: Called by one process with the directory.
        snapshot: Whether training goes on while files are written.

    Raises:
        RuntimeError: the policy is nested at the moment, or holds other weights than its own.
    """
    if policy.is_replaced:
        raise RuntimeError("a checkpoint is saved while the reference is in the policy's place")
    if policy.plan.skipped:
        raise RuntimeError("a checkpoint is saved outside of `nested`: the policy is not whole")
    policy.sync_parameters()

    def prepare() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def add() -> None:
        write_architecture(partial, policy.architecture)
        (partial / STATE_FILE).write_text(json.dumps(state or {}, indent=2) + "\n", "utf-8")
        if add_files is not None:
            add_files(partial)

    on_main(prepare, policy.context)
    tensors = _sharded_state(policy, optimizer, is_loading=False)
    writer = CheckpointWriter(tensors, partial, policy.context, snapshot=snapshot)
    on_main(add, policy.context)
    return writer


def save_weights(
    policy: Policy,
    directory: Path,
    *,
    optimizer: PolicyOptimizer | None = None,
    state: dict[str, Any] | None = None,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write one checkpoint directory and wait for it; an older one of the same name is replaced.

    Every process calls it; `begin_checkpoint` says what the arguments are.

    Raises:
        RuntimeError: a process could not write, or the policy is nested at the moment.
    """
    writer = begin_checkpoint(
        policy,
        partial_directory(directory),
        optimizer=optimizer,
        state=state,
        add_files=add_files,
    )
    writer.write()
    writer.publish(directory, step=(state or {}).get("step"))


def find_problems(directory: Path, level: Level, context: ParallelContext) -> list[str]:
    """What is wrong with the files of a checkpoint, looked for by all processes together.

    Every process calls it and gets the same answer; see `checkpoints.manifest.verify`.
    """
    mine = verify(directory, level, (context.rank, context.world_size))
    # A manifest that cannot be read is found by everybody.
    return list(dict.fromkeys(p for problems in gather_all(mine, context) for p in problems))


def load_weights(policy: Policy, path: str | Path) -> None:
    """Fill the policy from a checkpoint of any layout.

    Raises:
        UserError: there is no checkpoint, it is broken, or holds another architecture, or more than
            data.
    """
    directory = resolve_checkpoint(path)
    check_files(directory, "sizes", policy.context)
    _load(policy, None, directory)


def load_checkpoint(policy: Policy, optimizer: PolicyOptimizer, path: str | Path) -> dict[str, Any]:
    """Fill policy, optimizer and schedule; returns the saved `state`, `step` among it.

    Raises:
        UserError: as `load_weights` does, and for a checkpoint that holds weights only.
    """
    directory = resolve_checkpoint(path)
    check_files(directory, "sizes", policy.context)
    state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    if "step" not in state:
        raise UserError(
            f"{directory}: holds weights only; start from it with `model.checkpoint`, "
            "`checkpoint.resume` needs one that a run saved"
        )
    _load(policy, optimizer, directory)
    return state


def check_files(directory: Path, level: Level, context: ParallelContext) -> None:
    """Refuse a checkpoint whose files are not what its manifest says; every process calls it.

    Raises:
        UserError: names the files and what is wrong with them.
    """
    problems = find_problems(directory, level, context)
    if problems:
        raise UserError(f"{directory}: is broken: {'; '.join(problems)}")


def _load(policy: Policy, optimizer: PolicyOptimizer | None, directory: Path) -> None:
    saved = read_checkpoint_architecture(directory)
    # The family and the spread of fresh weights say nothing about the tensors.
    unseen = {"family", "init_method_std", "embedding_init_method_std"}
    shapes = [a.model_dump(exclude=unseen) for a in (saved, policy.architecture)]
    differing = sorted(key for key in shapes[0] if shapes[0][key] != shapes[1][key])
    if differing:
        found = ", ".join(f"{key}={shapes[0][key]}" for key in differing)
        wanted = ", ".join(f"{key}={shapes[1][key]}" for key in differing)
        raise UserError(f"{directory}: holds a model with {found}; this run's has {wanted}")
    index = read_index(directory)
    requested = _sharded_state(policy, optimizer, is_loading=True)
    for name in _chunk_names(policy):
        requested[name] = _without_absent_scales(requested[name], index)
    try:
        with _weights_only_loading():
            loaded: Any = dist_checkpointing.load(requested, str(directory))
    except (CheckpointException, CheckpointingException, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{directory}: cannot be loaded: {reason}") from error
    for name, chunk in zip(_chunk_names(policy), policy.chunks, strict=True):
        lacking, foreign = chunk.load_state_dict(loaded[name], strict=False)
        lacking = [key for key in lacking if not key.endswith(_EXTRA_STATE)]
        if lacking or foreign:
            raise RuntimeError(f"{directory}: not loaded: {lacking}; not asked for: {foreign}")
    if optimizer is not None:
        optimizer.load_state(loaded["optimizer"])
        optimizer.scheduler.load_state_dict(loaded["scheduler"])


def _without_absent_scales(requested: dict[str, Any], index: Metadata) -> dict[str, Any]:
    """What is asked for, but for float8 scales that the checkpoint lacks.

    Each layer spec keeps them beside modules of its own, and so does each version of Transformer
    Engine; a fresh scale is as good.
    """

    def is_absent(value: Any) -> bool:
        is_scale = isinstance(value, ShardedObject) and value.key.endswith(_EXTRA_STATE)
        return is_scale and value.unique_key not in index.state_dict_metadata

    _, kept = extract_matching_values(requested, is_absent)
    return kept  # pyright: ignore[reportReturnType]


def _sharded_state(
    policy: Policy, optimizer: PolicyOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    names = _chunk_names(policy)
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, policy.chunks, strict=True)
    }
    if optimizer is not None:
        optimizer.make_state()
        model_state = state["model"] if len(names) == 1 else {name: state[name] for name in names}
        state["optimizer"] = optimizer.megatron.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=metadata
        )
        state["scheduler"] = optimizer.scheduler.state_dict()
    return state


def _chunk_names(policy: Policy) -> list[str]:
    count = len(policy.chunks)
    return ["model"] if count == 1 else [f"model{index}" for index in range(count)]


@contextmanager
def _weights_only_loading() -> Iterator[None]:
    """Make every torch.load inside of Megatron refuse anything but data."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
