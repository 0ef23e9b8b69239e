"""One checkpoint on its way to the disk, while training waits for it or goes on.

Beginning and publishing are collective and belong to the main thread; writing and hashing touch no
process group and may run in a thread. Megatron's own writer spawns a manager process and forks one
writer per file. To fork a process that uses CUDA is unsafe, and the manager costs seconds of
imports, so files are written by this process on every machine.
"""

from __future__ import annotations

import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from nested_reft_mcore.checkpoints.manifest import (
    FileEntry,
    Manifest,
    file_names,
    hash_files,
    write_manifest,
)
from nested_reft_mcore.checkpoints.publish import publish, sync_tree
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.faults import fault_point
from nested_reft_mcore.mcore.agreement import gather_all, on_main

# What torch's archives say of a full disk; other errors at this place are those of collectives.
_ARCHIVE_ERROR = re.compile(r"iostream error|unexpected pos|PytorchStreamWriter|inline_container")


class OneSidedError(RuntimeError):
    """One process has failed where the others wait for it: it can agree on nothing any more."""


class SaveError(RuntimeError):
    """A process could not write its files; raised on all processes alike."""


class CheckpointWriter:
    """Writes one checkpoint: `CheckpointWriter(...)`, `write()`, `publish()`."""

    def __init__(
        self,
        sharded_state: dict[str, Any],
        partial: Path,
        context: ParallelContext,
        *,
        snapshot: bool,
    ) -> None:
        """Plan who writes what, and bring tensors to the host. Every process calls it.

        Args:
            sharded_state: As Megatron makes it.
            partial: An existing directory that nobody else uses.
            context: Of this process.
            snapshot: Copy tensors that are on the host already, so that training may change them
                while they are written. Those of a GPU are copied in any case.

        Raises:
            OneSidedError: this process could not write what goes first.
        """
        # The names of Megatron's modules are looked up when a strategy is used: without a queue
        # of ours a process would be spawned just to hold one.
        filesystem_async._results_queue = queue.Queue()
        strategy = _Strategy("torch_dist", 1, thread_count=1)
        self._partial = partial
        self._context = context
        with _one_sided(partial):
            self._request: Any = dist_checkpointing.save(
                sharded_state, str(partial), sharded_strategy=strategy, async_sharded_save=True
            )
        self._buckets: list[Any] = []
        if self._request.async_fn is not None:
            self._buckets = _on_host(self._request, snapshot=snapshot)
        self._entries: list[FileEntry] = []
        self._error: str | None = None
        self._thread: threading.Thread | None = None

    def write(self) -> None:
        """Write and hash this process's files; what goes wrong is told by `publish`."""
        try:
            if self._buckets:
                rank, _, results = self._request.async_fn_args
                self._request.async_fn(rank, self._buckets, results)
            names = [name for _, name, _ in self._buckets]
            self._buckets = []
            self._entries = hash_files(self._partial, names)
        # Whatever it is, the other processes have to hear of it.
        except Exception as error:
            self._error = f"rank {self._context.rank}: {type(error).__name__}: {error}"

    def write_in_background(self) -> None:
        """`write` in a thread; training may go on."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this process has nothing more to write."""
        return self._thread is None or not self._thread.is_alive()

    def publish(
        self, final: Path, *, step: int | None = None, check: Callable[[], None] | None = None
    ) -> Manifest:
        """Wait for all files, write index and manifest, and give the checkpoint its name.

        Every process calls it. `check` is asked by the first process before each of the last two
        and stops everything by raising.

        Raises:
            SaveError: a process could not write; the message names it, and the file.
            OneSidedError: this process could not write the index.
        """
        if self._thread is not None:
            self._thread.join()
        errors = [error for error in gather_all(self._error, self._context) if error]
        if errors:
            if check is not None:
                # Files may have gone because the run directory has a new owner.
                on_main(check, self._context)
            raise SaveError(f"{final}: could not be saved: {'; '.join(errors)}")
        with _one_sided(self._partial):
            for finalize in self._request.finalize_fns:
                finalize()
        entries = [e for share in gather_all(self._entries, self._context) for e in share]
        finish = partial(self._finish, final, entries, step, check)
        manifest: Manifest = on_main(finish, self._context)
        return manifest

    def _finish(
        self,
        final: Path,
        entries: list[FileEntry],
        step: int | None,
        check: Callable[[], None] | None,
    ) -> Manifest:
        hashed = {entry.name for entry in entries}
        rest = [name for name in file_names(self._partial) if name not in hashed]
        entries = [*entries, *hash_files(self._partial, rest)]
        sync_tree(self._partial)
        fault_point("before-manifest", step or 0, self._context.rank)
        if check is not None:
            check()
        manifest = write_manifest(self._partial, entries, step=step)
        if check is not None:
            check()
        publish(self._partial, final)
        return manifest


@contextmanager
def _one_sided(directory: Path) -> Iterator[None]:
    """Around what Megatron writes in the midst of its own collectives."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not _ARCHIVE_ERROR.search(str(error)):
            raise
        free = shutil.disk_usage(directory).free
        raise OneSidedError(
            f"{directory}: could not be saved ({free / 1e6:.1f} MB free): "
            f"{type(error).__name__}: {error}"
        ) from error


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's, with a writer that starts no process."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        if request.async_fn is None:
            return request
        transforms, _ = request.async_fn.args
        return request._replace(async_fn=partial(_write_here, transforms))


def _write_here(transforms: Any, _rank: int, buckets: Any, results: Any) -> None:
    """Write every file of this process and wait for the disk. Raises what writing raises."""
    outcome = {}
    for index, bucket in enumerate(buckets):
        written: Any = queue.SimpleQueue()
        count: Any = queue.Queue()
        count.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, written, count, use_fsync=True
        )
        _, result = written.get()
        if isinstance(result, Exception):
            raise RuntimeError(f"{bucket[0]}: {type(result).__name__}: {result}") from result
        outcome[index] = result
    results.put(outcome)


def _on_host(request: Any, *, snapshot: bool) -> list[Any]:
    """What the request writes, in host memory; with `snapshot` in memory of its own."""
    staged = request.preload_fn()
    if not snapshot:
        return staged
    buckets = []
    for (path, name, (data, tensors)), (_, _, (_, originals)) in zip(
        staged, request.async_fn_args[1], strict=True
    ):
        own = [
            (item, tensor.clone() if _shares_memory(tensor, original) else tensor)
            for (item, tensor), (_, original) in zip(tensors, originals, strict=True)
        ]
        buckets.append((path, name, (data, own)))
    return buckets


def _shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.device == other.device and one.data_ptr() == other.data_ptr()
