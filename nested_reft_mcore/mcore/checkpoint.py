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

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from nested_reft_mcore.config.checkpoint_layout import (
    ARCHITECTURE_FILE,
    LATEST_FILE,
    read_checkpoint_architecture,
    resolve_checkpoint,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.mcore.checkpoint_safety import check_pickles
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer

STATE_FILE = "state.json"
"""Step, data position and whatever else the training loop wants back."""


def save_checkpoint(
    root: Path,
    step: int,
    policy: Policy,
    optimizer: PolicyOptimizer | None,
    state: dict[str, Any],
    keep: int,
    add_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write `root/step_<step>` aside, rename it, then move `latest`; drop all but `keep` newest.

    Every process calls it. A kill at any moment leaves the previous checkpoint as the latest one.

    Args:
        root: Directory of a run's checkpoints.
        step: Steps that are done.
        policy: At full depth.
        optimizer: Left out where only weights are wanted.
        state: JSON values that come back from `load_checkpoint`.
        keep: Newest checkpoints to keep.
        add_files: Called by one process with the directory before it gets its name.

    Raises:
        RuntimeError: the policy is nested at the moment.
    """
    final = root / f"step_{step:08d}"
    save_weights(
        policy, final, optimizer=optimizer, state={"step": step, **state}, add_files=add_files
    )
    if policy.context.is_main:
        _write_whole(root / LATEST_FILE, final.name + "\n")
        for old in sorted(root.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
        for torn in root.glob(".partial_*"):
            shutil.rmtree(torn)
    _barrier()
    return final


def save_weights(
    policy: Policy,
    directory: Path,
    *,
    optimizer: PolicyOptimizer | None = None,
    state: dict[str, Any] | None = None,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write one checkpoint directory; an older one of the same name is replaced."""
    if policy.plan.skipped:
        raise RuntimeError("a checkpoint is saved outside of `nested`: the policy is not whole")
    policy.sync_parameters()
    partial = directory.with_name(f".partial_{directory.name}")
    if policy.context.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    dist_checkpointing.save(_sharded_state(policy, optimizer, is_loading=False), str(partial))
    if policy.context.is_main:
        architecture = policy.architecture.model_dump_json(indent=2)
        _write_whole(partial / ARCHITECTURE_FILE, architecture + "\n")
        _write_whole(partial / STATE_FILE, json.dumps(state or {}, indent=2) + "\n")
        if add_files is not None:
            add_files(partial)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
        _sync_directory(directory.parent)
    _barrier()


def load_weights(policy: Policy, path: str | Path) -> None:
    """Fill the policy from a checkpoint of any layout.

    Raises:
        UserError: there is no checkpoint, it is broken, or holds another architecture, or more than
            data.
    """
    _load(policy, None, resolve_checkpoint(path))


def load_checkpoint(policy: Policy, optimizer: PolicyOptimizer, path: str | Path) -> dict[str, Any]:
    """Fill policy, optimizer and schedule; returns the saved `state`, `step` among it."""
    directory = resolve_checkpoint(path)
    state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    if "step" not in state:
        raise UserError(
            f"{directory}: holds weights only; start from it with `model.checkpoint`, "
            "`checkpoint.resume` needs one that a run saved"
        )
    _load(policy, optimizer, directory)
    return state


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
    check_pickles(directory)
    requested = _sharded_state(policy, optimizer, is_loading=True)
    try:
        with _weights_only_loading():
            loaded: Any = dist_checkpointing.load(requested, str(directory))
    except (CheckpointException, CheckpointingException, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{directory}: cannot be loaded: {reason}") from error
    for name, chunk in zip(_chunk_names(policy), policy.chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    if optimizer is not None:
        optimizer.load_state(loaded["optimizer"])
        optimizer.scheduler.load_state_dict(loaded["scheduler"])


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


def _write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier(
            device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None
        )
