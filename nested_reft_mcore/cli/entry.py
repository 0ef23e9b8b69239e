"""From a checked configuration to running processes and one exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.launch import LaunchConfig
from nested_reft_mcore.config.layout import check_layout, needed_processes
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.lifeline import Lifeline
from nested_reft_mcore.launch.parent import signal_at_parents_death
from nested_reft_mcore.launch.ranks import discover_ranks, node_name
from nested_reft_mcore.launch.signals import StopSignals
from nested_reft_mcore.observability.logging import configure_logging, forgive_stderr, open_rank_log

if TYPE_CHECKING:
    from typing import NoReturn

    from nested_reft_mcore.launch.meeting import Meeting
    from nested_reft_mcore.launch.mpi import MpiWorld
    from nested_reft_mcore.launch.preflight import Needs, Report

_log = logging.getLogger(__name__)

_PEER_LEFT = ("closed by peer", "reset by peer", "connection refused")
_PEER_HANGS = ("timed out waiting", "timeout")
_HEAD_START_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """What a command asks for, before any process is started."""

    parallel: ParallelConfig
    architecture: ModelArchitecture
    work: Callable[[ParallelContext, StopSignals], int]
    """Runs on every process; returns the exit code."""
    check_batches: Callable[[int], None] | None = None
    """Refuses batches that so many data-parallel replicas cannot share."""
    seed: int = 0
    log_dir: Path | None = None
    """Where a bare start keeps the output of its processes; log files of ranks lie beside it."""
    log_level: Literal["debug", "info", "warning"] = "info"
    stoppable: bool = False
    """Whether `work` heeds a request to stop; otherwise SIGTERM ends it at once."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How the processes meet, and watch over each other."""
    needs: Needs | None = None
    """What the preflight looks for; without it there is none."""
    preflight: Literal["auto", "always", "never"] = "never"
    """`auto` where there are several processes."""
    tell: Callable[[str], None] = _log.info
    """Takes the table of a preflight that went well."""


def leave(command: Callable[[], int]) -> NoReturn:
    """Run a command and leave with its code: a user's mistake is a message, never a traceback."""
    try:
        code = command()
    except UserError as error:
        code = _refuse(error)
    except KeyboardInterrupt:
        code = 130
    ranks = _ranks_or_single()
    well = code in (ExitCode.OK, ExitCode.COME_BACK)
    if ranks.launcher == "mpirun" or (ranks.world_size > 1 and not well):
        # Clean-up could wait for processes that are gone, and the failure would never be seen.
        # Under mpirun all leave at once: it may kill whoever is left after the first.
        _flush()
        os._exit(int(code))
    if not _flush():
        # The interpreter would try again, and leave with 120.
        os._exit(int(code))
    sys.exit(int(code))


def _flush() -> bool:
    """Whether the console has taken everything."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return False
    return True


def _refuse(error: UserError) -> int:
    """Tell of a mistake that was found before the processes met; the exit code.

    Mostly every process finds it. Where one alone does, its node is bad, and the others must not
    wait for it.
    """
    ranks = _ranks_or_single()
    if ranks.launcher == "mpirun":
        # There the others end as soon as one leaves, maybe before rank 0 has said why. Whoever is
        # left after that has found something of its own.
        if ranks.rank:
            time.sleep(_HEAD_START_SECONDS)
        _print_error(error, ranks.rank)
        return ExitCode.USER_ERROR
    if ranks.rank == 0:
        _print_error(error)
    if ranks.world_size > 1:
        from nested_reft_mcore.launch.meeting import refuse

        problem = refuse(ranks, error)
        if problem is not None:
            if ranks.rank == 0:
                _print_problem(problem)
            return ExitCode.PREFLIGHT
    return ExitCode.USER_ERROR


def run_job(make: Callable[[], Job]) -> int:
    """Check a job against the processes there are; start what is missing; run it.

    Started alone, with sizes that need several processes, this starts them on this machine with
    the same command line, and answers for them. A Slurm step of one task and an mpirun of one
    process count as started alone. Under mpirun all processes return the same code.

    Args:
        make: reads and checks the configuration.

    Returns:
        The exit code.

    Raises:
        UserError: the configuration is wrong, or the sizes do not fit.
    """
    with StopSignals() as stop:
        job = make()
        ranks = discover_ranks(os.environ)
        if (
            ranks is not None
            and ranks.launcher == "torchrun"
            and "TORCHELASTIC_RUN_ID" in os.environ
        ):
            # SIGUSR1 kills torchrun unless it is told to forward it, and its orphans would run on
            # to the end, unseen. Its death is a request to stop: they save and leave.
            signal_at_parents_death(signal.SIGTERM)
        alone = ranks is None or (ranks.launcher == "srun" and ranks.world_size == 1)
        needed = needed_processes(job.parallel)
        world_size = needed if alone or ranks is None else ranks.world_size
        data_parallel_size = check_layout(job.architecture, job.parallel, world_size)
        if job.check_batches is not None:
            job.check_batches(data_parallel_size)
        if alone and needed > 1:
            return _start_local(needed, job.log_dir, stop)
        if job.stoppable:
            return _work(job, ranks or _single(), stop)
    if stop.received is not None:
        return 128 + stop.received
    # The handlers that end the process at once are back.
    return _work(job, ranks or _single(), stop)


def _start_local(num_processes: int, log_dir: Path | None, stop: StopSignals) -> int:
    import torch

    from nested_reft_mcore.launch.spawn import run_local

    devices = torch.cuda.device_count() if torch.cuda.is_available() else num_processes
    if devices < num_processes:
        raise UserError(
            f"parallel: the sizes need {num_processes} processes with a GPU each, but this machine "
            f"has {devices}; choose smaller sizes, or use several machines with srun, torchrun or "
            "mpirun"
        )
    if stop.requested:
        return ExitCode.COME_BACK
    return run_local(sys.argv[1:], num_processes, log_dir=log_dir)


def _single() -> RankInfo:
    """The only process there is; it meets nobody, so the address is never used."""
    return RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")


def _work(job: Job, ranks: RankInfo, stop: StopSignals) -> int:
    """Join the others, work, and part."""
    # Both are read when torch and Megatron are imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    forgive_stderr()
    configure_logging(job.log_level, ranks.rank, ranks.world_size)
    from nested_reft_mcore.launch.meeting import PreflightError

    world = _meet_by_mpi(ranks) if ranks.launcher == "mpirun" else None
    host = node_name(os.environ)
    line = Lifeline(ranks.rank, host)
    if job.log_dir is not None:
        line.note = open_rank_log(job.log_dir.parent, ranks.rank, host)
        line.note(f"process {os.getpid()}, {ranks.world_size} in all: {' '.join(sys.argv[1:])}")
    try:
        code = _work_together(job, world.ranks if world else ranks, stop, line)
        if world is not None:
            code = world.part(code)
    except UserError as error:
        line.note(f"error: {error}")
        line.fail(ExitCode.USER_ERROR, f"error: {_indented(error)}", error=error)
        # May be this process's own finding, which nobody else would tell.
        _print_error(error, ranks.rank)
        return ExitCode.USER_ERROR
    except PreflightError as error:
        line.fail(ExitCode.PREFLIGHT, f"preflight: {_indented(error)}")
        if ranks.rank == 0 or not error.is_common:
            _print_problem(str(error))
        return ExitCode.PREFLIGHT
    except Exception as error:
        return _explain(error, ranks, line)
    return code


def _work_together(job: Job, ranks: RankInfo, stop: StopSignals, line: Lifeline) -> int:
    """Meet the other processes, watch over each other, and do the job."""
    from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown

    meeting = None
    if ranks.world_size > 1:
        from nested_reft_mcore.launch.meeting import meet

        meeting = meet(ranks, line, job.launch)
    flight = _Preflight(job, ranks, meeting, line)
    flight.look_at_nodes()
    with flight.deadline("making process groups", range(ranks.world_size)):
        context = initialize_parallel(
            job.parallel,
            ranks,
            job.seed,
            store=meeting.store if meeting else None,
            lifeline=line,
        )
    flight.try_links(context)
    code = job.work(context, stop)
    shutdown()
    line.part()
    return code


class _Preflight:
    """The preflight of one job, as far as it wants one; imports what it needs when it runs."""

    def __init__(self, job: Job, ranks: RankInfo, meeting: Meeting | None, line: Lifeline) -> None:
        self._job, self._ranks, self._meeting, self._line = job, ranks, meeting, line
        is_wanted = job.preflight == "always" or (job.preflight == "auto" and meeting is not None)
        self._needs = job.needs if is_wanted else None
        self._reports: list[Report] = []
        self._seconds = 0.0

    def look_at_nodes(self) -> None:
        """Before any group exists. Raises PreflightError."""
        if self._needs is not None:
            from nested_reft_mcore.launch.preflight import check_nodes

            self._line.phase = "preflight, looking at its node"
            started = time.monotonic()
            self._reports = check_nodes(self._needs, self._ranks, self._meeting)
            self._seconds = time.monotonic() - started

    def deadline(self, name: str, members: Sequence[int]) -> AbstractContextManager[None]:
        """Ends the job where the block, in which these ranks need each other, takes too long."""
        if self._meeting is None:
            return nullcontext()
        from nested_reft_mcore.launch.links import LinkCheck

        launch = self._job.launch
        seconds = (
            launch.join_deadline_seconds
            if self._needs is None
            else launch.preflight_deadline_seconds
        )
        return LinkCheck(self._ranks, self._meeting, self._line, seconds)(name, members)

    def try_links(self, context: ParallelContext) -> None:
        """Through every group; then tell that all is well. Raises PreflightError."""
        if self._needs is None:
            return
        from nested_reft_mcore.launch.links import Link, LinkCheck, measure_links
        from nested_reft_mcore.launch.preflight_report import preflight_table

        started = time.monotonic()
        links: list[Link] = []
        if self._meeting is not None:
            check = LinkCheck(self._ranks, self._meeting, self._line, self._needs.deadline_seconds)
            links = measure_links(context, self._meeting, check)
        if context.is_main:
            seconds = self._seconds + time.monotonic() - started
            self._job.tell(preflight_table(self._needs, self._reports, links, seconds))


def _meet_by_mpi(ranks: RankInfo) -> MpiWorld:
    from nested_reft_mcore.launch.mpi import MpiWorld

    return MpiWorld(ranks)


def _explain(error: Exception, ranks: RankInfo, line: Lifeline) -> ExitCode:
    """Print an unforeseen error; tell one of our own from the loss of another process."""
    import torch.distributed as dist

    text = str(error).lower()
    from_collective = isinstance(error, dist.DistError) or type(error) is RuntimeError
    said = f"{type(error).__name__}: {error}"
    if from_collective and any(sign in text for sign in _PEER_LEFT):
        # The cause is with the one that left; who watches over all knows which one that is.
        text = f"lost touch with another process: {said}"
        line.fail(ExitCode.PEER_LOST, text, error=error, is_consequence=True)
        print(f"[rank {ranks.rank}] another process left", file=sys.stderr, flush=True)
        return ExitCode.PEER_LOST
    traceback.print_exception(error)
    sys.stderr.flush()
    line.note("".join(traceback.format_exception(error)))
    hangs = from_collective and any(sign in text for sign in _PEER_HANGS)
    code = ExitCode.PEER_LOST if hangs else ExitCode.FAILURE
    line.fail(code, said, error=error, is_consequence=hangs)
    return code


def _ranks_or_single() -> RankInfo:
    """This process among the launched ones, for messages; alone where the environment is wrong."""
    try:
        return discover_ranks(os.environ) or _single()
    except UserError:
        return _single()


def _indented(error: Exception) -> str:
    return str(error).replace("\n", "\n  ")


def _print_error(error: UserError, rank: int = 0) -> None:
    prefix = f"[rank {rank}] " if rank else ""
    print(f"{prefix}error: {_indented(error)}", file=sys.stderr, flush=True)


def _print_problem(problem: str) -> None:
    """Why the preflight ends a job."""
    for line in problem.splitlines():
        print(f"preflight: {line}", file=sys.stderr, flush=True)
