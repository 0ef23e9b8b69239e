"""Start N copies of a command on this machine, pass signals on, and answer for their exit codes.

torch's elastic launcher is used as a library to start the processes and to keep their output. Its
own waiting kills the others at once when one fails; here they get a grace period, so that each can
say what it saw.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import (
    LogsDest,
    LogsSpecs,
    PContext,
    SignalException,
    start_processes,
)

from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.parent import LOCAL_MARKER
from nested_reft_mcore.launch.ranks import node_name
from nested_reft_mcore.launch.verdict import VERDICT_KEY, Verdict
from nested_reft_mcore.launch.watch import Outcome, WorkerWatch

_FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_POLL_SECONDS = 0.05
_TAIL_LINES = 40


def run_local(
    argv: Sequence[str],
    num_processes: int,
    *,
    command: Sequence[str] | None = None,
    log_dir: Path | None = None,
    grace_seconds: float = 10.0,
) -> int:
    """Run `command + argv` in `num_processes` processes that find each other; return one exit code.

    Every worker has torchrun's variables in its environment. SIGUSR1, SIGTERM, SIGINT, SIGHUP and
    SIGQUIT go on to the workers. When one fails, the others get `grace_seconds`, then SIGTERM, then
    as long again, then SIGKILL; an interrupt starts the same clock, a second one kills at once. If
    this process dies, the workers die with it. To be called in the main thread.

    Rank 0 writes to this console itself, so that a terminal stays one. What the others write goes
    to `rank_N.stderr` and `rank_N.stdout` in `log_dir` (by default in a temporary directory, which
    is removed after a success). The error of the rank that failed first is the last thing printed.

    Args:
        argv: what follows the command.
        num_processes: how many to start.
        command: what to start; by default this package under this Python.
        log_dir: where to keep the output; made if it is not there.
        grace_seconds: patience with the others after one has failed.

    Returns:
        0 if all left with 0; 75 if all left with 75; else the code of the first that failed. A
        worker killed by signal s counts as 128 + s, or 4 where the others left because of it.
    """
    command = command or (sys.executable, "-m", "nested_reft_mcore")
    directory = log_dir or Path(tempfile.mkdtemp(prefix="nested_reft_"))
    directory.mkdir(parents=True, exist_ok=True)
    with _SignalQueue() as signals:
        # The meeting point of the workers, held here: its port is never free for others to take.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            context = _start([*command, *argv], num_processes, directory, store.port)
        except SignalException as error:
            return 128 + error.sigval
        # start_processes has put its own handlers in place.
        signals.install()
        watch = WorkerWatch(context.pids(), grace_seconds)
        try:
            while not watch.done:
                watch.handle(signals.take())
                watch.poll()
                time.sleep(_POLL_SECONDS)
        finally:
            watch.kill_groups()
            context.close(signal.SIGKILL)
    verdict = _verdict(store)
    outcome = watch.outcome(verdict)
    well = outcome.code in (ExitCode.OK, ExitCode.COME_BACK)
    if not well:
        _tell(outcome, watch, verdict, directory)
    if log_dir is None and (well or outcome.code == ExitCode.USER_ERROR):
        shutil.rmtree(directory, ignore_errors=True)
    return outcome.code


def worker_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What a local worker's environment has beside this process's own."""
    added = {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # torch then joins the store that the launcher holds instead of opening one in rank 0.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        LOCAL_MARKER: "local",
        # Processes that share cores must not spin while they wait for each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
    }
    if not torch.cuda.is_available():
        added["TORCHDYNAMO_DISABLE"] = os.environ.get("TORCHDYNAMO_DISABLE", "1")
    return added


def _start(command: Sequence[str], num_processes: int, directory: Path, port: int) -> PContext:
    """Start the workers, each behind the shim that ties it to this process."""
    shim = ("-m", "nested_reft_mcore.launch.worker", str(os.getpid()), *command)
    ranks = range(num_processes)
    return start_processes(
        name="nested-reft",
        entrypoint=sys.executable,
        args={rank: shim for rank in ranks},
        envs={rank: worker_environment(rank, num_processes, port) for rank in ranks},
        logs_specs=_RankFiles(directory),
        log_line_prefixes={0: ""},
    )


def _log_file(directory: Path, rank: int, stream: str) -> Path:
    return directory / f"rank_{rank}.{stream}"


class _RankFiles(LogsSpecs):
    """One file per rank and stream; rank 0 keeps the console."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self._directory = directory

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the files; an empty name leaves the stream as it is."""
        stdouts = {rank: str(_log_file(self._directory, rank, "stdout")) for rank in envs}
        stderrs = {rank: str(_log_file(self._directory, rank, "stderr")) for rank in envs}
        # Rank 0 has to be heard on a full disk as well.
        return LogsDest(
            stdouts=stdouts | {0: ""},
            stderrs=stderrs | {0: ""},
            error_files=dict.fromkeys(envs, os.devnull),
        )

    @property
    def root_log_dir(self) -> str:
        """The directory of all files."""
        return str(self._directory)


class _SignalQueue:
    """Signals to this process, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._former: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._waiting.append(signum)

    def install(self) -> None:
        """Install the handlers, also once more after somebody else's."""
        for number in _FORWARDED:
            signal.signal(number, self._note)

    def take(self) -> list[int]:
        """Signals since the last call."""
        taken, self._waiting = self._waiting, []
        return taken

    def __enter__(self) -> _SignalQueue:
        self._former = {number: signal.getsignal(number) for number in _FORWARDED}
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _verdict(store: TCPStore) -> Verdict | None:
    """What the workers have found to be the cause of their end, if they have."""
    if not store.check([VERDICT_KEY]):
        return None
    return Verdict.from_json(store.get(VERDICT_KEY))


def _tell(outcome: Outcome, watch: WorkerWatch, verdict: Verdict | None, directory: Path) -> None:
    """Print which rank failed first, and with what; rank 0 has its say on this console already."""
    sys.stdout.flush()
    rank = outcome.rank
    if outcome.code in (ExitCode.USER_ERROR, ExitCode.PREFLIGHT) and (verdict or not rank):
        return
    witnesses = [other for other, code in watch.codes.items() if code == ExitCode.PEER_LOST]
    if rank or (rank not in witnesses and witnesses):
        # Where rank 0 itself is lost, the others know what they were waiting for.
        witness = rank or witnesses[0]
        path = _log_file(directory, witness, "stderr")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if outcome.code == ExitCode.USER_ERROR:
            print("\n".join(lines[-_TAIL_LINES:]), file=sys.stderr)
            return
        if lines:
            print(f"--- rank {witness}, last lines of stderr ---", file=sys.stderr)
            print("\n".join(lines[-_TAIL_LINES:]), file=sys.stderr)
    code = watch.codes[rank]
    reason = f"exit code {code}"
    if rank in watch.stopped_by_us:
        reason = "it hung, and was killed"
    elif code > 128:
        reason = f"killed by {signal.Signals(code - 128).name}"
    where = f"rank {rank} on {node_name(os.environ)}"
    print(f"{where} failed first ({reason}); logs: {directory}", file=sys.stderr)
