"""Is every node fit for the job? What each process finds at home, compared before any group exists.

`links` tests the connections after that.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.launch.doctor import REQUIREMENTS
from nested_reft_mcore.launch.meeting import Meeting, PreflightError
from nested_reft_mcore.launch.ranks import node_name

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

_OTHERS = ("transformer-engine", "flash-attn", "tokenizers", "mpi4py")
_SLACK_SECONDS = 10.0
_SHARED_SECONDS = 15.0
"""A network file system shows other nodes' new files after a moment."""
_MOST_FILES = 2000
_MOST_PROBLEMS = 8
_GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


@dataclass(frozen=True)
class Needs:
    """What a job asks of every node."""

    run_dir: Path
    inputs: tuple[Path, ...] = ()
    """Files, and directories of files, that every node has to be able to read."""
    checkpoint_bytes: int = 0
    """Size of one checkpoint."""
    num_checkpoints: int = 2
    """As many of them have to find room."""
    require_gpu: bool = False
    deadline_seconds: float = 60.0
    """Of each check."""


@dataclass
class Report:
    """What one process has found at home."""

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    """Name of its GPU; empty where it sees none."""
    free_bytes: int = 0
    num_files: int = 0
    problems: list[str] = field(default_factory=list)
    """Each starts with the name of the check."""


def check_nodes(needs: Needs, ranks: RankInfo, meeting: Meeting | None) -> list[Report]:
    """Look at this node, and compare it with the others; every process calls it.

    Returns:
        The reports of all processes on rank 0; its own elsewhere.

    Raises:
        PreflightError: on every process, where at least one has found something.
    """
    if meeting is None:
        reports = [examine(needs, ranks, None)]
        _raise(compare(reports, needs.require_gpu))
        return reports
    store, patience = meeting.store, datetime.timedelta(seconds=needs.deadline_seconds)
    with _marker(needs.run_dir, ranks, store) as find_marker:
        report = examine(needs, ranks, find_marker)
        store.set(f"report/{ranks.rank}", json.dumps(asdict(report)))
        if ranks.rank == 0:
            reports, problems = _collect(store, meeting.hosts, patience)
            problems += compare(reports, needs.require_gpu)
            store.set("preflight", json.dumps(problems))
        else:
            reports, problems = [report], _hear(store, meeting.hosts[0], needs.deadline_seconds)
    _raise(problems)
    return reports


def examine(needs: Needs, ranks: RankInfo, find_marker: Callable[[], str] | None) -> Report:
    """What this process sees; files are looked at by the first process of each node."""
    report = Report(ranks.rank, node_name(os.environ), find_versions(), "")
    checks: list[Callable[[], str]] = []

    def gpu() -> str:
        report.device, problem = look_for_gpu(ranks.local_rank)
        return problem

    checks.append(gpu)
    if ranks.local_rank == 0:
        checks += [
            lambda: _check_writing(needs.run_dir, ranks.rank),
            lambda: _check_room(needs, report),
            lambda: _check_reading(needs.inputs, report),
        ]
        if find_marker is not None:
            checks.append(find_marker)
    for check in checks:
        problem = check()
        if problem:
            report.problems.append(problem)
    return report


def compare(reports: Sequence[Report], require_gpu: bool) -> list[str]:
    """What is wrong, each with rank and host; nothing if all is well."""
    found = [
        f"{problem.replace(': ', f': rank {report.rank} on {report.host}: ', 1)}"
        for report in reports
        for problem in report.problems
    ]
    wanted = require_gpu or any(report.device for report in reports)
    why = "launch.require_gpu is set" if require_gpu else "others see one"
    found += [
        f"gpu: rank {report.rank} on {report.host}: sees no GPU, and {why}"
        for report in reports
        if wanted and not report.device and not any(p.startswith("gpu:") for p in report.problems)
    ]
    return found + _odd_versions(reports)


def find_versions() -> dict[str, str]:
    """Versions of Python, of the packages that count, and of this very code."""
    versions = {"python": platform.python_version()}
    for name in (*(requirement.distribution for requirement in REQUIREMENTS), *_OTHERS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    import torch

    # Not the distribution's, which may be another than the one that is imported.
    versions["torch"] = str(torch.__version__)
    versions["CUDA of torch"] = str(torch.version.cuda)
    versions["nested_reft_mcore"] = _code_digest()
    return versions


def look_for_gpu(local_rank: int) -> tuple[str, str]:
    """Name of this process's GPU, or nothing; and what is wrong, or nothing."""
    import torch

    if not torch.cuda.is_available():
        given = [name for name in _GPU_VARIABLES if os.environ.get(name, "-1") not in ("", "-1")]
        if given and torch.version.cuda is not None:
            return "", f"gpu: {given[0]}={os.environ[given[0]]}, but torch sees no GPU"
        return "", ""
    count = torch.cuda.device_count()
    if local_rank >= count:
        return "", f"gpu: this is process {local_rank} of its node, which shows {count} GPUs"
    name = torch.cuda.get_device_name(local_rank)
    try:
        total = torch.ones(1024, device=f"cuda:{local_rank}").sum().item()
    except RuntimeError as error:
        return name, f"gpu: {name} fails: {str(error).splitlines()[0]}"
    return name, "" if total == 1024.0 else f"gpu: {name} adds 1024 ones up to {total}"


def _check_writing(run_dir: Path, rank: int) -> str:
    probe = run_dir / f".preflight_{rank}_{secrets.token_hex(4)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with probe.open("w", encoding="utf-8") as file:
            file.write("preflight\n")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        return f"write: {run_dir} (run_dir): {error.strerror}"
    return ""


def _check_room(needs: Needs, report: Report) -> str:
    try:
        report.free_bytes = shutil.disk_usage(needs.run_dir).free
    except OSError:
        # Writing has failed there, which says more.
        return ""
    needed = needs.checkpoint_bytes * needs.num_checkpoints
    if report.free_bytes >= needed:
        return ""
    return (
        f"disk: {needs.run_dir} (run_dir) has {format_bytes(report.free_bytes)} free; "
        f"{needs.num_checkpoints} checkpoints of {format_bytes(needs.checkpoint_bytes)} need "
        f"{format_bytes(needed)}"
    )


def _check_reading(inputs: Sequence[Path], report: Report) -> str:
    for path in inputs:
        try:
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            if not path.exists():
                return f"read: {path}: does not exist"
            for file in files[:_MOST_FILES]:
                _read_both_ends(file)
                report.num_files += 1
        except OSError as error:
            return f"read: {error.filename or path}: {error.strerror}"
    return ""


def _read_both_ends(file: Path) -> None:
    with file.open("rb") as stream:
        stream.read(1)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        stream.read(1)


def _code_digest() -> str:
    """A checksum of this package's sources."""
    import nested_reft_mcore

    root = Path(nested_reft_mcore.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _odd_versions(reports: Sequence[Report]) -> list[str]:
    """Where a process has another version than most; rank 0's counts where it is even."""
    found: list[str] = []
    for name in sorted({name for report in reports for name in report.versions}):
        values = [report.versions.get(name, "not installed") for report in reports]
        counts = Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        what = "this package's code, by checksum" if name == "nested_reft_mcore" else name
        found += [
            f"versions: rank {report.rank} on {report.host}: {what} is {value}, on "
            f"{counts[usual]} of {len(values)} processes {usual}"
            for report, value in zip(reports, values, strict=True)
            if value != usual
        ]
    return found


@contextlib.contextmanager
def _marker(run_dir: Path, ranks: RankInfo, store: Store) -> Iterator[Callable[[], str]]:
    """Rank 0 leaves a file in the run directory; the check whether a node sees it."""
    if ranks.rank == 0:
        path = run_dir / f".preflight_{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            run_dir.mkdir(parents=True, exist_ok=True)
            path.touch()
        store.set("marker", path.name)
        try:
            yield lambda: ""
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        return

    def find() -> str:
        path = run_dir / store.get("marker").decode()
        end = time.monotonic() + _SHARED_SECONDS
        while not path.exists():
            if time.monotonic() > end:
                return (
                    f"shared: {run_dir} (run_dir) does not show what rank 0 wrote there; expected "
                    "one directory that all nodes see"
                )
            time.sleep(0.2)
        return ""

    yield find


def _collect(
    store: Store, hosts: Sequence[str], patience: datetime.timedelta
) -> tuple[list[Report], list[str]]:
    """Rank 0: everybody's report, and who gave none."""
    keys = [f"report/{rank}" for rank in range(len(hosts))]
    with contextlib.suppress(RuntimeError):
        store.wait(keys, patience)
    reports: list[Report] = []
    problems: list[str] = []
    for rank, key in enumerate(keys):
        if store.check([key]):
            values: dict[str, Any] = json.loads(store.get(key))
            reports.append(Report(**values))
        else:
            problems.append(
                f"files: rank {rank} on {hosts[rank]}: looks at its files, and has not come back "
                f"within {patience.total_seconds():g} s"
            )
    return reports, problems


def _hear(store: Store, host: str, seconds: float) -> list[str]:
    """The others: what rank 0 makes of all reports."""
    # Rank 0 may spend its own patience twice: on its files, and on others' reports.
    try:
        store.wait(["preflight"], datetime.timedelta(seconds=2 * seconds + _SLACK_SECONDS))
        return json.loads(store.get("preflight"))
    except RuntimeError as error:
        raise PreflightError(
            f"files: rank 0 on {host}: has said nothing within {2 * seconds:g} s"
        ) from error


def _raise(problems: Sequence[str]) -> None:
    if not problems:
        return
    shown = list(problems[:_MOST_PROBLEMS])
    if len(problems) > _MOST_PROBLEMS:
        shown.append(f"and {len(problems) - _MOST_PROBLEMS} more")
    raise PreflightError("\n".join(shown), is_common=True)


def format_bytes(count: float) -> str:
    """For people, in powers of ten."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"
