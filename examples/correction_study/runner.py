"""Start the runs of a study as processes of their own, a few at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan import EVALUATION_FILE, OUTCOME_FILE, Setup, StudyRun, state_of

from nested_reft_mcore.studies.schema import words_of

MAKE_TASK = Path(__file__).resolve().parents[1] / "cpu_demo" / "make_task.py"
OUTPUT_FILE = "output.txt"
"""In a run's directory: what its process printed."""
PROBE_FILE = "probe.json"
"""In a run's directory: the sensitivity of its warm start, where the law asks for it."""


@dataclass
class _Running:
    run: StudyRun
    process: subprocess.Popen[bytes]
    started: float
    commands: list[list[str]]
    """What is to follow this process."""
    cpu_seconds: float = 0.0
    """Of the processes before this one."""


class Runner:
    """Takes runs in their order, leaves out those that are done, and records how each ended."""

    def __init__(
        self,
        root: Path,
        jobs: int,
        say: Callable[[str], None],
        deadline: float | None = None,
        commands: Callable[[StudyRun, Path], list[list[str]]] | None = None,
    ) -> None:
        """`deadline`: value of time.time() after which nothing is started any more.

        `commands` gives the command lines of a run below a root; left out: `nested-reft`'s.
        """
        self._commands = commands or commands_of
        self._root = root
        self._jobs = jobs
        self._say = say
        self._deadline = deadline
        self._running: list[_Running] = []
        self.broken: list[str] = []
        """Names of runs that ended with an error, or whose warm-up did."""

    def run(self, runs: Sequence[StudyRun], retry: bool) -> None:
        """Run what is missing, interrupted or stale; with `retry` also what is broken."""
        waiting = []
        for run in runs:
            state = state_of(run, self._root)
            if state == "broken" and not retry:
                self._call_broken(run)
            elif state != "finished":
                waiting.append(run)
        try:
            while waiting or self._running:
                if self._deadline is not None and time.time() > self._deadline and waiting:
                    self._say(f"time is up: {len(waiting)} runs are left for another sitting")
                    waiting.clear()
                self._start_some(waiting)
                self._reap()
                time.sleep(0.2)
        finally:
            for running in self._running:
                os.killpg(running.process.pid, signal.SIGKILL)

    def _start_some(self, waiting: list[StudyRun]) -> None:
        """Start runs whose warm-up is there, while places are free; drop those that never can."""
        busy = {running.run.name for running in self._running}
        unfinished = busy | {run.name for run in waiting}
        for run in list(waiting):
            if len(self._running) >= self._jobs:
                return
            if run.start in self.broken:
                waiting.remove(run)
                self._call_broken(run)
            elif run.start not in unfinished:
                waiting.remove(run)
                self._running.append(self._start(run))

    def _call_broken(self, run: StudyRun) -> None:
        self.broken.append(run.name)
        self._say(f"broken   {run.name}: see {self._root / run.name / OUTPUT_FILE}")

    def _start(self, run: StudyRun) -> _Running:
        directory = self._root / run.name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        first, *commands = self._commands(run, self._root)
        self._say(f"started  {run.name}")
        return _Running(run, _open(first, directory), time.time(), commands)

    def _reap(self) -> None:
        """Go on where a process has ended: with the run's next command, or with its outcome."""
        for running in list(self._running):
            # The processor time of this one process and those that it waited for.
            pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
            if pid == 0:
                continue
            exit_code = running.process.returncode = os.waitstatus_to_exitcode(status)
            running.cpu_seconds += usage.ru_utime + usage.ru_stime
            if exit_code == 0 and running.commands:
                directory = self._root / running.run.name
                running.process = _open(running.commands.pop(0), directory)
                continue
            self._running.remove(running)
            self._record(running, exit_code)

    def _record(self, running: _Running, exit_code: int) -> None:
        run, seconds = running.run, time.time() - running.started
        outcome = {
            "exit_code": exit_code,
            "options": run.options,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(running.cpu_seconds, 1),
        }
        directory = self._root / run.name
        if exit_code == 0 and run.start is not None:
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        aside = directory / f".{OUTCOME_FILE}"
        aside.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
        aside.replace(directory / OUTCOME_FILE)
        if exit_code == 0:
            self._say(f"finished {run.name}  {seconds:.0f} s")
        else:
            self._call_broken(run)


def _open(words: list[str], directory: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that nothing of it is left when it is stopped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with (directory / OUTPUT_FILE).open("ab") as output:
        return subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def make_task(setup: Setup, root: Path) -> Path:
    """The directory with the prompts and the tokenizer of a setup; written if it is not there."""
    directory = root / setup.warm_up_of / "task"
    if not (directory / "tokenizer.model").is_file():
        script = [sys.executable, str(MAKE_TASK), "--output", str(directory), *setup.task]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    return directory


def commands_of(run: StudyRun, root: Path) -> list[list[str]]:
    """The command lines of a run: `nested-reft sft` or `train`, and `evaluate` if it is apart."""
    directory, task = root / run.name, make_task(run.setup, root)
    files = {
        "run_dir": str(directory),
        "seed": run.seed,
        "data.tokenizer_path": str(task / "tokenizer.model"),
        "data.train_path": str(task / ("sft.jsonl" if run.start is None else "train.jsonl")),
        "data.eval_path": str(task / "eval.jsonl"),
    }
    config = str(run.setup.config)
    options = words_of({**files, **run.options})
    if run.start is None:
        commands = [["sft", config, *options]]
    else:
        start = ["--checkpoint", str(root / run.start / "checkpoints")]
        commands = []
        if run.options["nested.law"] == "sensitivity":
            probe = str(directory / PROBE_FILE)
            commands.append(["probe", *start, "--output", probe, *_probe_options(run.setup, files)])
            options += words_of({"nested.sensitivity_path": probe})
        commands.append(["train", config, *start, *options])
    if run.setup.evaluation is not None:
        end = ["--checkpoint", str(directory / "checkpoints")]
        output = ["--output", str(directory / EVALUATION_FILE)]
        apart = words_of(run.setup.evaluation)
        commands.append(["evaluate", config, *end, *output, *options, *apart])
    return [[sys.executable, "-m", "nested_reft_mcore", *words] for words in commands]


def _probe_options(setup: Setup, files: dict[str, Any]) -> list[str]:
    """The probe reads training prompts, at the seed of the run."""
    given = {
        "prompts": files["data.train_path"],
        "tokenizer": files["data.tokenizer_path"],
        "seed": files["seed"],
        **setup.probe,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]
