"""A run's checkpoints: which one to go on from, one save in flight at most, which ones to keep."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nested_reft_mcore.checkpoints.manifest import Manifest
from nested_reft_mcore.checkpoints.publish import partial_directory, set_aside
from nested_reft_mcore.checkpoints.root import (
    checkpoint_name,
    leftovers,
    list_checkpoints,
    move_latest,
    outdated,
    pass_over,
)
from nested_reft_mcore.config.checkpoint_layout import (
    ARCHITECTURE_FILE,
    LATEST_FILE,
    resolve_checkpoint,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import CheckpointConfig
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.faults import fault_point
from nested_reft_mcore.mcore.agreement import on_main
from nested_reft_mcore.mcore.checkpoint import begin_checkpoint, find_problems
from nested_reft_mcore.mcore.checkpoint_writer import CheckpointWriter
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.observability.timers import Timers

_log = logging.getLogger(__name__)


@dataclass
class _InFlight:
    """A save whose files are being written."""

    step: int
    started: float
    """On the monotonic clock, in seconds."""
    writer: CheckpointWriter
    stalls: Timers
    """`timing_s/save`: for how long training has waited."""


class RunCheckpoints:
    """The checkpoints of one run directory; every process calls the same methods."""

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        context: ParallelContext,
        *,
        token: str,
        check_owner: Callable[[], None],
    ) -> None:
        """`check_owner` raises on the first process where the run directory is somebody else's.

        `token` keeps unfinished files of different starts apart.
        """
        self.root = root
        self._config = config
        self._context = context
        self._token = token
        self._check_owner = check_owner
        self._in_flight: _InFlight | None = None
        self._metrics: dict[str, float] = {}
        self.newest: int | None = None
        """Step of the newest checkpoint that this run has written or gone on from."""

    def find(self) -> Path | None:
        """The checkpoint that `checkpoint.resume` asks for; nothing where a run starts afresh.

        Raises:
            UserError: the one that is named does not exist or is broken.
        """
        resume = self._config.resume
        if resume == "never":
            return None
        if resume == "auto":
            return self._newest_whole()
        path = Path(resume)
        steps = list(list_checkpoints(path).values())
        if steps and not (path / ARCHITECTURE_FILE).is_file():
            path = steps[-1]
        directory = resolve_checkpoint(path)
        problems = find_problems(directory, "checksums", self._context)
        if problems:
            raise UserError(
                f"{directory}: is broken: {'; '.join(problems)}; name another with "
                "checkpoint.resume, or let `auto` choose among those of the run directory"
            )
        return directory

    def begin(self, checkpoint: Path | None, step: int) -> None:
        """Start the run's history at `checkpoint`, after `step` steps.

        Checkpoints of later steps are broken or of a course that is not taken: they get other
        names, or retention would take them for the newest and remove those of this run.
        """
        if checkpoint is not None and checkpoint.parent.resolve() == self.root.resolve():
            self.newest = step

        def take_out() -> None:
            for number, path in list_checkpoints(self.root).items():
                if number > step or checkpoint is None:
                    aside = pass_over(path)
                    _log.warning(
                        "%s is not part of this run, which starts after step %d: it is now %s",
                        *(path, step, aside.name),
                    )
            remaining = list(list_checkpoints(self.root))
            if remaining:
                move_latest(self.root, remaining[-1])
            else:
                (self.root / LATEST_FILE).unlink(missing_ok=True)

        on_main(take_out, self._context)

    def start(
        self,
        step: int,
        policy: Policy,
        optimizer: PolicyOptimizer,
        state: dict[str, Any],
        add_files: Callable[[Path], None],
    ) -> None:
        """Save; with `async_save` this returns as soon as training may change the weights."""
        self.finish()
        started, stalls = time.monotonic(), Timers()
        with stalls("save"):
            writer = begin_checkpoint(
                policy,
                partial_directory(self.root / checkpoint_name(step), self._token),
                optimizer=optimizer,
                state={"step": step, **state},
                add_files=add_files,
                snapshot=self._config.async_save,
            )
            self._in_flight = _InFlight(step, started, writer, stalls)
            if self._config.async_save:
                writer.write_in_background()
            else:
                writer.write()
        if not self._config.async_save:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this process still writes files of a save."""
        return self._in_flight is not None and not self._in_flight.writer.is_written

    @property
    def has_unpublished(self) -> bool:
        """Whether a save has begun that has no name yet; the same on every process."""
        return self._in_flight is not None

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and publish it; then drop old ones.

        Raises:
            SaveError: a process could not write.
            SupersededError: the run directory is somebody else's.
        """
        if self._in_flight is None:
            return
        save, self._in_flight = self._in_flight, None
        with save.stalls("save"):
            final = self.root / checkpoint_name(save.step)
            manifest = save.writer.publish(final, step=save.step, check=self._check_owner)
            fault_point("before-latest", save.step, self._context.rank)
            on_main(partial(self._tidy, save.step), self._context)
        self.newest = save.step
        self._metrics = _save_metrics(save, manifest)
        if self._context.is_main:
            _log.info("saved step %d: %s", save.step, self.root)

    def metrics(self) -> dict[str, float]:
        """Seconds, bytes and stall of the latest save, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _newest_whole(self) -> Path | None:
        """Newest first; says which ones it passes over, and why."""
        found: dict[int, Path] = on_main(partial(list_checkpoints, self.root), self._context)
        for path in reversed(found.values()):
            problems = find_problems(path, "checksums", self._context)
            if not problems:
                return path
            if self._context.is_main:
                more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
                _log.warning("PASSED OVER checkpoint %s: %s%s", path, problems[0], more)
        return None

    def _tidy(self, step: int) -> None:
        """Move `latest`, then remove what is outdated, and what killed saves have left."""
        move_latest(self.root, step)
        checkpoints = list_checkpoints(self.root)
        config = self._config
        for old in outdated(list(checkpoints), config.keep_last, config.keep_every):
            aside = set_aside(checkpoints[old])
            fault_point("mid-removal", step, self._context.rank)
            shutil.rmtree(aside)
        for path in leftovers(self.root):
            shutil.rmtree(path)


def _save_metrics(save: _InFlight, manifest: Manifest) -> dict[str, float]:
    return {
        "checkpoint/save_seconds": time.monotonic() - save.started,
        "checkpoint/bytes": float(manifest.num_bytes),
        "checkpoint/stall_seconds": save.stalls.collect()["timing_s/save"],
    }
