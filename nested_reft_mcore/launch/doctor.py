"""`nested-reft doctor`: what is installed, what is missing, and what is used instead.

A package that is there but cannot be imported is a finding, not a crash.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any, Literal

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.mpi_library import kind_of_mpirun, library_name, load_mpi

_KERNELS = "nested_reft_mcore.mcore.native"

Status = Literal["ok", "not there", "broken", "too old", "wrong version"]


@dataclass(frozen=True)
class Requirement:
    """A package that has to be there."""

    distribution: str
    module: str
    version: str = ""
    """`>=` or `==` and a version; any will do if empty."""
    purpose: str = ""


REQUIREMENTS = (
    Requirement("torch", "torch", ">=2.6", "everything"),
    Requirement("megatron-core", "megatron.core", "==0.16.1", "model, parallelism, optimizer"),
    Requirement("psutil", "psutil", "", "Megatron's checkpoint writer hangs without it"),
    Requirement("tqdm", "tqdm", "", "Megatron"),
    Requirement("numpy", "numpy", "", "Megatron"),
    Requirement("jaxtyping", "jaxtyping", "", "shapes in signatures"),
    Requirement("transformers", "transformers", ">=5", "tokenizers"),
    Requirement("safetensors", "safetensors", "", "Hugging Face weights"),
    Requirement("sentencepiece", "sentencepiece", "", "tokenizers"),
    Requirement("protobuf", "google.protobuf", "", "sentencepiece models in transformers"),
    Requirement("pydantic", "pydantic", ">=2", "configuration"),
    Requirement("PyYAML", "yaml", "", "configuration"),
    Requirement("typer", "typer", "", "command line"),
    Requirement("rich", "rich", "", "progress and tables"),
    Requirement("tensorboard", "tensorboard", "", "logs"),
    Requirement("math-verify", "math_verify", "", "the math_verify reward"),
    Requirement("pyarrow", "pyarrow", "", "parquet files"),
    Requirement("jinja2", "jinja2", "", "chat templates"),
    Requirement("matplotlib", "matplotlib", "", "plots of atlas and probe"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    version: str
    """Installed version, or what went wrong; may be empty."""
    needed: bool
    note: str
    """What it is for, or what is used instead."""

    @property
    def fatal(self) -> bool:
        """Whether nothing runs without it."""
        return self.needed and self.status != "ok"


def run_doctor(as_json: bool = False) -> int:
    """Print the report; returns 0, or 1 if something needed is missing."""
    findings = examine()
    devices = find_devices()
    healthy = not any(finding.fatal for finding in findings)
    if as_json:
        report = {
            "healthy": healthy,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": devices,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        _print_tables(findings, devices, healthy)
    return ExitCode.OK if healthy else ExitCode.FAILURE


def examine() -> list[Finding]:
    """Look for everything that is needed or could be used."""
    return [*map(check_requirement, REQUIREMENTS), *check_communication(), *check_accelerators()]


def check_requirement(requirement: Requirement) -> Finding:
    """Look for one needed package."""

    def finding(status: Status, version: str) -> Finding:
        return Finding(requirement.distribution, status, version, True, requirement.purpose)

    try:
        version = metadata.version(requirement.distribution)
    except metadata.PackageNotFoundError:
        return finding(
            "not there", f"pip install '{requirement.distribution}{requirement.version}'"
        )
    # Only mcore/ imports Megatron; here it is enough to find it.
    look = _find if requirement.module.startswith("megatron") else _load
    problem = look(requirement.module)
    if problem is not None:
        return finding("broken", problem)
    wanted = requirement.version
    if wanted.startswith("==") and version.split("+")[0] != wanted[2:]:
        return finding("wrong version", f"{version}, expected {wanted[2:]}")
    if wanted.startswith(">=") and _numbers(version) < _numbers(wanted[2:]):
        return finding("too old", f"{version}, expected {wanted[2:]} or later")
    return finding("ok", version)


def check_communication() -> list[Finding]:
    """How processes can talk to each other."""
    nccl = gloo = False
    if _load("torch") is None:
        import torch.distributed as dist

        if dist.is_available():
            nccl, gloo = dist.is_nccl_available(), dist.is_gloo_available()
    return [
        Finding(
            "NCCL",
            "ok" if nccl else "not there",
            "",
            False,
            "between GPUs" if nccl else "gloo is used instead",
        ),
        Finding(
            "gloo", "ok" if gloo else "not there", "", not nccl, "between processes without GPUs"
        ),
        _check_mpi(),
    ]


def check_accelerators() -> list[Finding]:
    """What makes runs faster or better watched where it is there."""
    return [
        _optional(
            "Transformer Engine",
            "transformer-engine",
            lambda: _load("transformer_engine.pytorch"),
            "fused layers",
            "Megatron's local layers are used instead",
        ),
        _optional(
            "apex (NVIDIA's)",
            "apex",
            _load_apex,
            "fused norms and Adam",
            "torch's norms and Adam are used instead",
        ),
        _optional(
            "flash-attn",
            "flash-attn",
            lambda: _load("flash_attn"),
            "attention of Transformer Engine",
            "torch's scaled_dot_product_attention is used instead",
        ),
        _optional(
            "wandb",
            "wandb",
            lambda: _load("wandb"),
            "tracking",
            "JSON lines and TensorBoard are used instead",
        ),
        _check_decode_kernels(),
    ]


def _check_decode_kernels() -> Finding:
    """Our own kernels, which `setup.py` builds where there is a compiler."""
    name, instead = "decode kernels", "torch decodes instead, on CPUs at a third of the speed"
    if problem := _load(_KERNELS):
        return Finding(name, "broken", problem, False, instead)
    # mcore may import launch, not the other way round; this part of it needs no Megatron.
    problem = importlib.import_module(_KERNELS).problem()
    if problem is None:
        return Finding(name, "ok", "", False, "decoding in float32 on this CPU")
    status = "not there" if problem.startswith("not built") else "broken"
    return Finding(name, status, problem, False, instead)


def find_devices() -> list[str]:
    """The devices that a run would use, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"CPU: {cores} cores of {platform.machine()}"
    if _load("torch") is not None:
        return [cpu]
    import torch

    if not torch.cuda.is_available():
        return [cpu]
    found: list[str] = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(f"GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    return [*found, cpu]


def _optional(
    name: str, distribution: str, load: Callable[[], str | None], use: str, instead: str
) -> Finding:
    """Look for a package that is used only where it works."""
    problem = load()
    if problem is None:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            version = ""
        return Finding(name, "ok", version, False, use)
    if problem.startswith("ModuleNotFoundError"):
        return Finding(name, "not there", "", False, instead)
    return Finding(name, "broken", problem, False, instead)


def _load(module: str) -> str | None:
    """Import a module; None, or what went wrong in one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except (Exception, SystemExit) as error:
        # Foreign code may raise anything here: Transformer Engine's empty package a RuntimeError.
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
    return None


def _find(module: str) -> str | None:
    """Look for a module without importing it; None, or what went wrong."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None if found is not None else f"ModuleNotFoundError: no module named {module!r}"


def _load_apex() -> str | None:
    """NVIDIA's apex has compiled parts; the package of that name in the Python index has none."""
    problem = _load("amp_C")
    if problem is None:
        return _load("apex.multi_tensor_apply")
    if problem.startswith("ModuleNotFoundError") and _load("apex") is None:
        return "another package of this name, or built without its CUDA parts: amp_C is missing"
    return problem


def _check_mpi() -> Finding:
    """mpi4py, the MPI that it loads, and whether there is an mpirun; MPI itself is not started."""
    kind = kind_of_mpirun()
    instead = "torchrun, srun or our own start"
    if problem := _load("mpi4py"):
        return _optional("MPI", "mpi4py", lambda: problem, "", instead)
    try:
        library = library_name(load_mpi(kind or "openmpi").Get_library_version())
    except UserError as error:
        text = str(error)
        return _optional("MPI", "mpi4py", lambda: text, "", instead)
    use = f"start with the mpirun of {kind} on the PATH" if kind else "no mpirun is on the PATH"
    found = _optional("MPI", "mpi4py", lambda: None, use, instead)
    return replace(found, version=f"{found.version} with {library}")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is 2, 13, 0."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _print_tables(findings: list[Finding], devices: list[str], healthy: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"Python {platform.python_version()} on {platform.platform()}", highlight=False)
    for device in devices:
        console.print(device, highlight=False)
    for title, needed in (("Needed", True), ("Used where it is there", False)):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "state", "version", "for" if needed else "used for / instead"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            if finding.needed == needed:
                colour = "green" if finding.status == "ok" else "red" if needed else "yellow"
                row: tuple[Any, ...] = (finding.name, f"[{colour}]{finding.status}[/]")
                table.add_row(*row, _escape(finding.version), _escape(finding.note))
        console.print()
        console.print(table)
    console.print()
    if healthy:
        console.print("Everything needed is there.")
        return
    for finding in findings:
        if finding.fatal:
            detail = f"{finding.name} is {finding.status}: {finding.version}"
            print(f"error: {detail}", file=sys.stderr)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
