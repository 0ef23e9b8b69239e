"""What `train` and `sft` share: run directory, policy, optimizer, metrics, checkpoints, leaving."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from nested_reft_mcore.checkpoints.publish import sync_file
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import CONFIG_FILE, dump_config
from nested_reft_mcore.config.schema import Config, OptimizerConfig
from nested_reft_mcore.hf.tokenizer_files import (
    CHECKPOINT_TOKENIZER_DIRECTORY,
    copy_tokenizer_files,
)
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.incarnation import (
    Incarnation,
    SupersededError,
    check_owner,
    take_over,
    this_incarnation,
)
from nested_reft_mcore.launch.signals import StopSignals
from nested_reft_mcore.mcore.agreement import on_main
from nested_reft_mcore.mcore.checkpoint import load_checkpoint
from nested_reft_mcore.mcore.checkpoint_writer import OneSidedError, SaveError
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.observability.environment import ENVIRONMENT_FILE, write_environment
from nested_reft_mcore.observability.progress import Progress
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.observability.tracking import METRICS_FILE, Tracker
from nested_reft_mcore.training.policy_setup import (
    find_tokenizer,
    load_policy,
    load_policy_tokenizer,
)
from nested_reft_mcore.training.reference import ReferencePolicy
from nested_reft_mcore.training.replicas import any_in_replica, any_process
from nested_reft_mcore.training.saving import RunCheckpoints
from nested_reft_mcore.training.state import RunState, StopRequest, Trouble, TroubleFound

_log = logging.getLogger(__name__)

_RUN_FILES = (CONFIG_FILE, ENVIRONMENT_FILE)
"""What of a run directory also goes into each checkpoint, beside the metrics."""


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
        keep_reference: bool = False,
    ) -> None:
        """Build policy and optimizer; go on from a checkpoint where `checkpoint.resume` says so.

        `keep_reference` keeps the weights that `config.model` names, before any checkpoint.

        Raises:
            UserError: a file or directory is missing, broken or of another kind.
        """
        self.config = config
        self.context = context
        self.directory, self.state = Path(config.run_dir), RunState()
        self.lifeline = context.lifeline
        self.timers = Timers(
            torch.cuda.synchronize if torch.cuda.is_available() else None,
            on_phase=partial(setattr, context.lifeline, "phase"),
        )
        self._stop = stop
        self._command = command
        self._num_steps = num_steps
        self.trouble = Trouble()
        self._check_origin()
        self.policy = load_policy(config.model, config.parallel, context, config.seed)
        self.tokenizer = load_policy_tokenizer(
            config.model, config.data.tokenizer_path, self.policy.architecture
        )
        self.optimizer = PolicyOptimizer(self.policy, optimizer, num_steps * updates_per_step)
        self.reference = ReferencePolicy(self.policy) if keep_reference else None
        self._incarnation: Incarnation = on_main(self._take_over, context)
        self.checkpoints = RunCheckpoints(
            self.directory / "checkpoints",
            config.checkpoint,
            context,
            token=self._incarnation.token,
            check_owner=self._check_owner,
        )
        stop.arm_deadline(config.checkpoint.stop_deadline_seconds, self._leave_unsaved)
        if config.checkpoint.requeue_on_lost_peer:
            self.lifeline.on_lost_peer = self._ask_for_another_start
        found = self.checkpoints.find()
        self.is_fresh = found is None
        self.tracker = self._begin(found)
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
        left = self.timers.collect() | self.checkpoints.metrics()
        with self.trouble.writing(self.directory / METRICS_FILE):
            if left and kind is None and self.trouble.text is None:
                self.tracker.log(self.state.step, left)
            self.tracker.close()

    def to_the_end(self, loop: Callable[[], int]) -> int:
        """Run `loop` and everything that is still to be saved; returns the exit code.

        A request to stop is answered by `COME_BACK`, with everything saved and `requeue` written; a
        run directory that has a new owner by `FAILURE`, with nothing written; a file that cannot be
        written, or rewards that cannot be judged, by `FAILURE`, with everything saved that can be.
        """
        try:
            with self:
                try:
                    try:
                        code = loop()
                        self._finish_saving()
                        if any_process((self.trouble.text is not None,), self.context)[0]:
                            raise TroubleFound
                    except StopRequest:
                        code = self._come_back_later()
                except TroubleFound:
                    code = self._stop_in_trouble()
                except SaveError as error:
                    code = self._stop_unsaved(error, self.trouble.of_all(self.context))
                except OneSidedError as error:
                    code = self._stop_alone(error, [])
        except SupersededError as error:
            if self.context.is_main:
                _log.error("%s", error)
            return ExitCode.FAILURE
        return code

    def check(self, *, may_stop: bool = True) -> None:
        """What all processes agree on before they go on or write; every process calls it.

        Also publishes a checkpoint whose files have been written meanwhile.

        Raises:
            TroubleFound: a process cannot go on, and it `may_stop` here.
            StopRequest: a process was asked to stop, and it `may_stop` here.
            SupersededError: the run directory has a new owner.
            SaveError: a checkpoint could not be written.
        """
        # A step that is done but not recorded yet is the last one, not the next.
        self.lifeline.step = self.state.step + (self.state.owed is None)
        superseded: SupersededError | None = None
        if self.context.is_main:
            try:
                self._check_owner()
            except SupersededError as error:
                superseded = error
        stop, lost, writing, trouble = any_process(
            (
                self._stop.requested,
                superseded is not None,
                self.checkpoints.is_writing,
                self.trouble.text is not None,
            ),
            self.context,
        )
        if lost:
            raise superseded or SupersededError(f"{self.directory} has a new owner")
        if self.checkpoints.has_unpublished and not writing:
            self._finish_saving()
        if trouble and may_stop:
            raise TroubleFound
        if stop and may_stop:
            raise StopRequest

    def is_interrupted(self) -> bool:
        """Whether a process of this replica was asked to stop; the same answer on all of them."""
        return any_in_replica(self._stop.requested, self.context)

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        step = self.state.step
        return step == self._num_steps or (interval > 0 and step % interval == 0)

    def log(self, metrics: dict[str, float]) -> None:
        """Record metrics of the present step, with the times of its phases."""
        with self.trouble.writing(self.directory / METRICS_FILE):
            self.tracker.log(self.state.step, metrics | self._times())

    def finish_step(self, metrics: dict[str, float], skipped: str, every: int = 1) -> None:
        """Record and show a step that is done, if it is one of `every` so many.

        `skipped` describes its plan.
        """
        if not self.is_due(every):
            return
        metrics = metrics | self._times()
        # The timers have run since the last step that was recorded.
        seconds = metrics["timing_s/step"] / every
        metrics["perf/time_per_step"] = seconds
        # verl's throughput: prompt and response tokens per second and process.
        tokens = metrics["perf/total_num_tokens"]
        metrics["perf/throughput"] = tokens / seconds / self.context.world_size
        metrics["training/skipped_updates"] = float(self.state.skipped_updates)
        metrics["nested/num_layers"] = float(self.policy.architecture.num_layers)
        with self.trouble.writing(self.directory / METRICS_FILE):
            self.tracker.log(self.state.step, metrics, texts={"nested/plan": skipped})
        self.progress.update(self.state.step, metrics, skipped=skipped)

    def save(self) -> None:
        """Begin a checkpoint of the present step, after waiting for the one before."""
        tokenizer = find_tokenizer(self.config.model, self.config.data.tokenizer_path)

        def add_files(directory: Path) -> None:
            target = directory / CHECKPOINT_TOKENIZER_DIRECTORY
            target.mkdir()
            copy_tokenizer_files(tokenizer, target)
            for name in (*_RUN_FILES, METRICS_FILE):
                sync_file(self.directory / name)
                shutil.copyfile(self.directory / name, directory / name)

        state = {"command": self._command, **asdict(self.state)}
        with self.timers("save_checkpoint"):
            self.checkpoints.start(self.state.step, self.policy, self.optimizer, state, add_files)

    def _open_tracker(self, *, is_resumed: bool) -> Tracker:
        recorded = self.state.step if self.state.owed is None else self.state.step - 1
        return Tracker(
            self.directory,
            is_main=self.context.is_main,
            resume_step=recorded if is_resumed else None,
            tensorboard=self.config.logging.tensorboard,
            wandb_project=self.config.logging.wandb_project,
            config=self.config.model_dump(mode="json"),
        )

    def _finish_saving(self) -> None:
        with self.timers("save_checkpoint"):
            self.checkpoints.finish()

    def _come_back_later(self) -> int:
        """Save what is not saved, tell the launcher to start the job again; its exit code."""
        self._save_all()
        self.check(may_stop=False)
        if self.context.is_main:
            with self.trouble.writing(self._requeue_file):
                self._write_requeue()
            if self.trouble.text is not None:
                _log.error("%s; start the same command again by hand", self.trouble.text)
            _log.info("asked to stop: saved after step %d, to be resumed", self.state.step)
        return ExitCode.COME_BACK

    def _save_all(self) -> None:
        self._finish_saving()
        if self.state.owed is not None:
            self.state.owed = self.state.owed | self._times()
        if self.checkpoints.newest != self.state.step:
            self.save()
            self._finish_saving()

    def _stop_in_trouble(self) -> int:
        """Save if that is possible, and say what is wrong, and where; the exit code."""
        troubles = self.trouble.of_all(self.context)
        try:
            self._save_all()
        except OneSidedError as error:
            return self._stop_alone(error, troubles)
        except (RuntimeError, OSError) as error:
            return self._stop_unsaved(error, troubles)
        outcome = f"saved after step {self.state.step}; the same command goes on from there"
        self._say(f"stopped: {outcome}", *troubles)
        return ExitCode.FAILURE

    def _stop_alone(self, error: OneSidedError, troubles: list[str]) -> int:
        """Say what could not be saved; the others wait for this process, and are ended with it."""
        outcome = f"{error}; {self._what_stands()}"
        self.lifeline.fail(ExitCode.FAILURE, "; ".join([outcome, *troubles]), error=error)
        self._say(f"stopped: {outcome}", *troubles)
        return ExitCode.FAILURE

    def _stop_unsaved(self, error: RuntimeError | OSError, troubles: list[str]) -> int:
        """Say what could not be saved, and what is wrong besides; the exit code."""
        self._say(f"{error}", f"stopped: could not be saved; {self._what_stands()}", *troubles)
        return ExitCode.FAILURE

    def _what_stands(self) -> str:
        newest = self.checkpoints.newest
        none = "there is no checkpoint yet"
        return none if newest is None else f"the checkpoint of step {newest} stands"

    def _say(self, *texts: str) -> None:
        for text in texts if self.context.is_main else ():
            _log.error("%s", text)

    def _times(self) -> dict[str, float]:
        return self.timers.collect() | self.checkpoints.metrics()

    @property
    def _requeue_file(self) -> Path:
        return self.directory / "requeue"

    def _write_requeue(self) -> None:
        # Where rank 0 is lost, all the others write the same.
        aside = self._requeue_file.with_name(f".requeue.{self.context.rank}")
        aside.write_text(f"step {self.checkpoints.newest or 0}\n", encoding="utf-8")
        aside.replace(self._requeue_file)

    def _check_origin(self) -> None:
        """Refuse weights from among the run's own checkpoints, which come and go."""
        origin, own = self.config.model.checkpoint, (self.directory / "checkpoints").resolve()
        if origin is not None and own in (Path(origin).resolve(), *Path(origin).resolve().parents):
            raise UserError(
                f"model.checkpoint: {origin} is among the checkpoints of run_dir={self.directory} "
                "itself; choose another run_dir"
            )

    def _leave_unsaved(self) -> None:
        """The last thing before the deadline of a stop: the newest checkpoint stands."""
        if self.context.is_main:
            self._ask_for_another_start()
        self.lifeline.silence()

    def _ask_for_another_start(self) -> None:
        """Write `requeue` unless somebody else has the run; several processes may do so at once."""
        with suppress(SupersededError):
            self._check_owner()
            self._write_requeue()

    def _describe_run(self) -> None:
        try:
            dump_config(self.config, self.directory / CONFIG_FILE)
            write_environment(self.directory, self.context.world_size)
            self._requeue_file.unlink(missing_ok=True)
        except OSError as error:
            where = error.filename or self.directory
            raise UserError(f"{where}: cannot be written: {error.strerror}") from error

    def _take_over(self) -> Incarnation:
        """Make the run directory this start's."""
        self.directory.mkdir(parents=True, exist_ok=True)
        mine = this_incarnation(os.environ)
        take_over(self.directory, mine)
        return mine

    def _check_owner(self) -> None:
        check_owner(self.directory, self._incarnation)

    def _begin(self, checkpoint: Path | None) -> Tracker:
        """Go on from a checkpoint if there is one, and open the run's records."""
        if checkpoint is not None:
            self._resume(checkpoint)
        self.checkpoints.begin(checkpoint, self.state.step)
        on_main(self._describe_run, self.context)
        return self._open_tracker(is_resumed=checkpoint is not None)

    def _resume(self, checkpoint: Path) -> None:
        state = load_checkpoint(self.policy, self.optimizer, checkpoint)
        if state.get("command") != self._command:
            raise UserError(
                f"{checkpoint}: was saved by `{state.get('command')}`, this is `{self._command}`; "
                "give the two run_dirs of their own; model.checkpoint starts from its weights"
            )
        self.state = RunState(**{name: state[name] for name in vars(RunState()) if name in state})
        metrics = self.directory / METRICS_FILE
        if self.context.is_main and not metrics.exists():
            shutil.copyfile(checkpoint / METRICS_FILE, metrics)
        if self.context.is_main:
            _log.info("%s: going on after step %d", checkpoint, self.state.step)
            if self.state.step >= self._num_steps:
                more = f"{self._command}.num_steps"
                _log.info("all %d steps are done; ask for more with %s", self._num_steps, more)
