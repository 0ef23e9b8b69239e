"""Runs a study here, one run after the other, so that a study that was stopped goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.studies.grid import Grid, StudyRun
from nested_reft_mcore.studies.states import (
    OUTPUT_FILE,
    Record,
    RunState,
    last_step,
    metrics_problem,
    now,
    read_record,
    set_aside,
    state_of,
    study_lock,
    write_record,
)

COME_BACK = 75
"""As `launch.exit_codes`: stopped on request, to be started again."""
_POLL_SECONDS = 0.2
_NEWS_SECONDS = 60.0
"""Between two lines about a run that goes on."""
# A run that does not stop is ended after so long: saving a large model takes its time.
_PATIENCE_SECONDS = 600.0


@dataclass
class Sitting:
    """What one call of `run` has done."""

    finished: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    interrupted: str | None = None
    """The run that was going on when somebody asked to stop."""
    left: int = 0
    """Runs that `limit` leaves for another sitting."""


class Runner:
    """Takes runs in the study's order; leaves out what is finished, broken or stale."""

    def __init__(
        self,
        grid: Grid,
        say: Callable[[str], None],
        command: Callable[[StudyRun], list[str]] | None = None,
        news_seconds: float = _NEWS_SECONDS,
    ) -> None:
        """`command` gives the command line of a run; left out: `nested-reft train`'s."""
        self._grid = grid
        self._say = say
        self._command = command or command_of
        self._news_seconds = news_seconds
        self._stops = 0
        self._seconds: dict[tuple[str, str], list[float]] = {}
        """Of runs that have finished, by size and layout: what the next ones will take."""

    def run(self, runs: Sequence[StudyRun], *, retry: bool, limit: int | None) -> Sitting:
        """Run what is missing or was stopped; with `retry` also what is broken or stale.

        Raises:
            UserError: another process runs this study, or its output cannot be written.
        """
        sitting = Sitting()
        with study_lock(self._grid.output), self._signals():
            waiting = [run for run in runs if self._is_due(run, retry, sitting)]
            if limit is not None:
                sitting.left = max(0, len(waiting) - limit)
                waiting = waiting[:limit]
            done = len(sitting.finished)
            self._say(
                f"{len(waiting)} runs to go, {done} finished earlier"
                + (f", {sitting.left} left for another sitting" if sitting.left else "")
            )
            for number, run in enumerate(waiting):
                if self._stops:
                    break
                left = self._left(waiting[number:])
                self._say(f"[{number + 1}/{len(waiting)}] {run.name}  {left}".rstrip())
                self._one(run, sitting)
        return sitting

    def _is_due(self, run: StudyRun, retry: bool, sitting: Sitting) -> bool:
        state = state_of(run)
        if state.kind == "finished":
            sitting.finished.append(run.name)
            record = read_record(run.directory)
            if record is not None and record.exit_code == 0:
                self._note_seconds(run, record.seconds)
            return False
        if state.kind in ("broken", "stale") and not retry:
            self._leave(run, state, sitting)
            return False
        if state.begins_anew:
            aside = set_aside(run.directory)
            told = f"{state.detail}; what there was is now {aside.name}"
            self._say(f"{state.kind:<8} {run.name}: {told}")
        return True

    def _leave(self, run: StudyRun, state: RunState, sitting: Sitting) -> None:
        (sitting.broken if state.kind == "broken" else sitting.stale).append(run.name)
        self._say(f"{state.kind:<8} {run.name}: {state.detail}; left alone, --retry runs it again")

    def _one(self, run: StudyRun, sitting: Sitting) -> None:
        earlier = read_record(run.directory)
        before = earlier.seconds if earlier is not None else 0.0
        started = now()
        write_record(run.directory, Record(started, None, before))
        code = self._wait(run, self._start(run), started)
        seconds = before + now() - started
        if self._stops and code != 0:
            # Stopped by the signal, saved or not: either way it is to be taken up again.
            write_record(run.directory, Record(started, COME_BACK, seconds))
            sitting.interrupted = run.name
            self._say(f"stopped  {run.name}: the same command goes on from here")
            return
        write_record(run.directory, Record(started, code, seconds))
        problem = f"exit code {code}, see {run.directory / OUTPUT_FILE}"
        if code == 0:
            problem = metrics_problem(run.directory, run.num_steps)
        if problem is not None:
            sitting.broken.append(run.name)
            self._say(f"broken   {run.name}: {problem}")
            return
        if not self._grid.study.keep_checkpoints:
            shutil.rmtree(run.directory / "checkpoints", ignore_errors=True)
        sitting.finished.append(run.name)
        self._note_seconds(run, seconds)
        self._say(f"finished {run.name}  {seconds:.0f} s")

    def _start(self, run: StudyRun) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C reaches this process, which passes it on."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        }
        try:
            with (run.directory / OUTPUT_FILE).open("ab") as output:
                return subprocess.Popen(
                    self._command(run),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise UserError(f"{run.name}: cannot be started: {error}") from None

    def _wait(self, run: StudyRun, process: subprocess.Popen[bytes], started: float) -> int:
        """Until the run has ended; tells now and then how far it is, and passes stops on."""
        told, asked, deadline = time.monotonic(), 0, None
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self._stops > asked:
                asked = self._stops
                deadline = deadline or time.monotonic() + _PATIENCE_SECONDS
                _end(process, signal.SIGTERM if asked == 1 else signal.SIGKILL)
                self._say("asked to stop: the run saves and leaves; once more ends it at once")
            if deadline is not None and time.monotonic() > deadline:
                _end(process, signal.SIGKILL)
            if time.monotonic() - told > self._news_seconds:
                told = time.monotonic()
                self._say(f"         {_how_far(run, started)}")
        # What a launcher that was killed has left.
        _end(process, signal.SIGKILL)
        return process.returncode

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """An interrupt counts, and the loop acts on it."""

        def note(number: int, frame: object) -> None:
            self._stops += 1

        former = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note_seconds(self, run: StudyRun, seconds: float) -> None:
        self._seconds.setdefault((run.point.size, run.point.layout), []).append(seconds)

    def _left(self, runs: Sequence[StudyRun]) -> str:
        """Time for these runs, by those of their size that have finished; empty if unknown."""
        means = {key: sum(found) / len(found) for key, found in self._seconds.items()}
        if not means:
            return ""
        overall = sum(means.values()) / len(means)
        of_size = {}
        for (size, _), mean in means.items():
            of_size.setdefault(size, []).append(mean)
        seconds = 0.0
        for run in runs:
            size, layout = run.point.size, run.point.layout
            known = of_size.get(size)
            usual = sum(known) / len(known) if known else overall
            seconds += means.get((size, layout), usual)
        unknown = any(run.point.size not in of_size for run in runs)
        return f"left {'at a guess ' if unknown else ''}{_clock(seconds)}"


def command_of(run: StudyRun) -> list[str]:
    """`nested-reft train` of a run; it starts as many processes as the layout needs."""
    command = [sys.executable, "-m", "nested_reft_mcore", "train"]
    return [*command, str(run.config_path), *run.words]


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the launcher; SIGKILL to all of its session."""
    try:
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except ProcessLookupError:
        pass


def _how_far(run: StudyRun, started: float) -> str:
    step = last_step(run.directory)
    told = f"step {step} of {run.num_steps}"
    if not step:
        return told
    return f"{told}, {_clock(now() - started)} so far"


def _clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{round(seconds) % 60:02}"
