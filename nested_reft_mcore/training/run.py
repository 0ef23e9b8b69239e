"""What `train` and `sft` share: run directory, policy, optimizer, metrics, checkpoints, leaving."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nested_reft_mcore.config.checkpoint_layout import LATEST_FILE
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import dump_config
from nested_reft_mcore.config.schema import Config, OptimizerConfig
from nested_reft_mcore.hf.tokenizer_files import (
    CHECKPOINT_TOKENIZER_DIRECTORY,
    copy_tokenizer_files,
)
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.signals import StopSignals
from nested_reft_mcore.mcore.checkpoint import load_checkpoint, save_checkpoint
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.observability.environment import write_environment
from nested_reft_mcore.observability.progress import Progress
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.observability.tracking import Tracker
from nested_reft_mcore.training.policy_setup import (
    find_tokenizer,
    load_policy,
    load_policy_tokenizer,
)
from nested_reft_mcore.training.replicas import any_process

_log = logging.getLogger(__name__)


@dataclass
class RunState:
    """What a run counts; comes back with a checkpoint."""

    step: int = 0
    """Steps that are done."""
    skipped_updates: int = 0
    """Updates that were not taken because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """The latest of them, since the last update that was taken."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position in the data."""

    def count(self, applied: bool, limit: int) -> None:
        """Note an update. RuntimeError after `limit` in a row that were not taken."""
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.skipped_updates += not applied
        if self.skipped_in_a_row >= limit:
            raise RuntimeError(
                f"step {self.step}: {limit} updates in a row had a loss or gradient that was not "
                "finite (train.max_skipped_updates); look for a learning rate that is too high, "
                "or for broken weights"
            )


class Run:
    """One run on one process. A context manager."""

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        stop: StopSignals,
        *,
        command: str,
        optimizer: OptimizerConfig,
        num_steps: int,
        updates_per_step: int = 1,
    ) -> None:
        """Build policy and optimizer; go on from a checkpoint where `checkpoint.resume` says so.

        Raises:
            UserError: a file or directory is missing, broken or of another kind.
        """
        self.config = config
        self.context = context
        self.directory = Path(config.run_dir)
        self.state = RunState()
        self.timers = Timers(torch.cuda.synchronize if torch.cuda.is_available() else None)
        self._stop = stop
        self._command = command
        self._num_steps = num_steps
        checkpoint = self._checkpoint_to_resume()
        self.policy = load_policy(config.model, config.parallel, context, config.seed)
        self.tokenizer = load_policy_tokenizer(
            config.model, config.data.tokenizer_path, self.policy.architecture
        )
        self.optimizer = PolicyOptimizer(self.policy, optimizer, num_steps * updates_per_step)
        if checkpoint is not None:
            self._resume(checkpoint)
        if context.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            dump_config(config, self.directory / "config.yaml")
            write_environment(self.directory, context.world_size)
            (self.directory / "requeue").unlink(missing_ok=True)
        self.tracker = Tracker(
            self.directory,
            is_main=context.is_main,
            resume_step=None if checkpoint is None else self.state.step,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project,
            config=config.model_dump(mode="json"),
        )
        self.progress = Progress(
            config.logging.progress if context.is_main else "off",
            num_steps,
            start_step=self.state.step,
            title=command,
        )

    def __enter__(self) -> Run:
        self.progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, error, traceback)
        left = self.timers.collect()
        if left and kind is None:
            self.tracker.log(self.state.step, left)
        self.tracker.close()

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.directory / "checkpoints"

    def should_stop(self) -> bool:
        """Whether any process was asked to stop; the same answer on all."""
        return any_process(self._stop.requested, self.context)

    def come_back_later(self) -> int:
        """Save, tell the launcher to start the job again, and give the exit code for it."""
        self.save()
        if self.context.is_main:
            (self.directory / "requeue").write_text(f"step {self.state.step}\n", encoding="utf-8")
            _log.info("asked to stop: saved after step %d, to be resumed", self.state.step)
        return ExitCode.COME_BACK

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        step = self.state.step
        return step == self._num_steps or (interval > 0 and step % interval == 0)

    def log(self, metrics: dict[str, float]) -> None:
        """Record metrics of the present step, with the times of its phases."""
        self.tracker.log(self.state.step, metrics | self.timers.collect())

    def finish_step(self, metrics: dict[str, float], skipped: str, every: int = 1) -> None:
        """Record and show a step that is done, if it is one of `every` so many.

        `skipped` describes its plan.
        """
        if not self.is_due(every):
            return
        metrics = metrics | self.timers.collect()
        # The timers have run since the last step that was recorded.
        seconds = metrics["timing_s/step"] / every
        metrics["perf/time_per_step"] = seconds
        # verl's throughput: prompt and response tokens per second and process.
        tokens = metrics["perf/total_num_tokens"]
        metrics["perf/throughput"] = tokens / seconds / self.context.world_size
        metrics["training/skipped_updates"] = float(self.state.skipped_updates)
        self.tracker.log(self.state.step, metrics)
        self.progress.update(self.state.step, metrics, skipped=skipped)

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        tokenizer = find_tokenizer(self.config.model, self.config.data.tokenizer_path)

        def add_tokenizer(directory: Path) -> None:
            target = directory / CHECKPOINT_TOKENIZER_DIRECTORY
            target.mkdir()
            copy_tokenizer_files(tokenizer, target)

        state = {"command": self._command, **vars(self.state)}
        with self.timers("save_checkpoint"):
            save_checkpoint(
                self.checkpoints,
                self.state.step,
                self.policy,
                self.optimizer,
                state,
                self.config.checkpoint.keep,
                add_files=add_tokenizer,
            )
        if self.context.is_main:
            _log.info("saved step %d: %s", self.state.step, self.checkpoints)

    def _checkpoint_to_resume(self) -> Path | None:
        resume = self.config.checkpoint.resume
        if resume == "never":
            return None
        if resume != "auto":
            return Path(resume)
        return self.checkpoints if (self.checkpoints / LATEST_FILE).is_file() else None

    def _resume(self, checkpoint: Path) -> None:
        state = load_checkpoint(self.policy, self.optimizer, checkpoint)
        if state.get("command") != self._command:
            raise UserError(
                f"{checkpoint}: was saved by `{state.get('command')}`, this is `{self._command}`; "
                "give the two run_dirs of their own, or start from its weights with "
                "model.checkpoint and checkpoint.resume=never"
            )
        self.state = RunState(**{name: state[name] for name in vars(RunState())})
        if self.context.is_main:
            _log.info("%s: going on after step %d", checkpoint, self.state.step)
            if self.state.step >= self._num_steps:
                _log.info(
                    "all %d steps are done; ask for more with %s.num_steps",
                    self._num_steps,
                    self._command,
                )
