"""From a checked configuration to running processes and one exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.layout import check_layout, needed_processes
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.parent import signal_at_parents_death
from nested_reft_mcore.launch.ranks import discover_ranks
from nested_reft_mcore.launch.signals import StopSignals
from nested_reft_mcore.observability.logging import configure_logging

if TYPE_CHECKING:
    from typing import NoReturn

    from nested_reft_mcore.launch.mpi import MpiWorld

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
    """Where a bare start keeps the output of its processes."""
    log_level: Literal["debug", "info", "warning"] = "info"
    stoppable: bool = False
    """Whether `work` heeds a request to stop; otherwise SIGTERM ends it at once."""


def leave(command: Callable[[], int]) -> NoReturn:
    """Run a command and leave with its code: a user's mistake is a message, never a traceback."""
    try:
        code = command()
    except UserError as error:
        # Found before the processes met, so every one of them has found the same.
        ranks = _ranks_or_single()
        if ranks.rank == 0:
            _print_error(error)
        elif ranks.launcher == "mpirun":
            # Ends the others as soon as one leaves, maybe before rank 0 has said why. Whoever is
            # left after that has found something of its own.
            time.sleep(_HEAD_START_SECONDS)
            _print_error(error, ranks.rank)
        code = ExitCode.USER_ERROR
    except KeyboardInterrupt:
        code = 130
    ranks = _ranks_or_single()
    well = code in (ExitCode.OK, ExitCode.COME_BACK)
    if ranks.launcher == "mpirun" or (ranks.world_size > 1 and not well):
        # Clean-up could wait for processes that are gone, and the failure would never be seen.
        # Under mpirun all leave at once: it may kill whoever is left after the first.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))
    sys.exit(int(code))


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
    configure_logging(job.log_level, ranks.rank, ranks.world_size)
    from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown

    world = _meet_by_mpi(ranks) if ranks.launcher == "mpirun" else None
    try:
        context = initialize_parallel(job.parallel, world.ranks if world else ranks, job.seed)
        code = job.work(context, stop)
        shutdown()
        if world is not None:
            code = world.part(code)
    except UserError as error:
        # May be this process's own finding, which nobody else would tell.
        _print_error(error, ranks.rank)
        return ExitCode.USER_ERROR
    except Exception as error:
        return _explain(error, ranks)
    return code


def _meet_by_mpi(ranks: RankInfo) -> MpiWorld:
    from nested_reft_mcore.launch.mpi import MpiWorld

    return MpiWorld(ranks)


def _explain(error: Exception, ranks: RankInfo) -> ExitCode:
    """Print an unforeseen error; tell one of our own from the loss of another process."""
    import torch.distributed as dist

    text = str(error).lower()
    from_collective = isinstance(error, dist.DistError) or type(error) is RuntimeError
    if from_collective and any(sign in text for sign in _PEER_LEFT):
        # The cause is with the one that left; where this process was waiting says nothing.
        print(f"[rank {ranks.rank}] another process left", file=sys.stderr, flush=True)
        return ExitCode.PEER_LOST
    traceback.print_exception(error)
    hangs = from_collective and any(sign in text for sign in _PEER_HANGS)
    return ExitCode.PEER_LOST if hangs else ExitCode.FAILURE


def _ranks_or_single() -> RankInfo:
    """This process among the launched ones, for messages; alone where the environment is wrong."""
    try:
        return discover_ranks(os.environ) or _single()
    except UserError:
        return _single()


def _print_error(error: UserError, rank: int = 0) -> None:
    prefix = f"[rank {rank}] " if rank else ""
    text = str(error).replace("\n", "\n  ")
    print(f"{prefix}error: {text}", file=sys.stderr, flush=True)
