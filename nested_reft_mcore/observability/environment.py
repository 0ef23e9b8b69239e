"""Where a run took place: versions, commit, machine, launcher. Nothing secret, a fixed list."""

from __future__ import annotations

import importlib
import json
import os
import platform
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ENVIRONMENT_FILE = "environment.json"
"""Name of the report in a run directory."""

_PACKAGES = (
    "nested_reft_mcore",
    "torch",
    "megatron-core",
    "transformers",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "numpy",
    "pydantic",
    "math-verify",
    "tensorboard",
    "transformer-engine",
    "flash-attn",
    "mpi4py",
    "wandb",
)

# Only these are ever read: the rest of the environment may hold tokens and passwords.
_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_RESTART_COUNT",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "TORCHDYNAMO_DISABLE",
)


def environment_report(world_size: int = 1) -> dict[str, Any]:
    """What somebody needs to know to run this again: JSON values only.

    Keys: `time` (UTC), `git`, `versions` (None: not installed), `python`, `platform`, `hostname`,
    `cpu`, `decode_kernels` (None: usable here; else why not), `devices`, `world_size`, `variables`.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpu": {"model": _cpu_model(), "count": _cpu_count(), "memory_gib": _memory_gib()},
        "decode_kernels": _decode_kernels_problem(),
        "devices": _devices(),
        "world_size": world_size,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def write_environment(run_dir: str | Path, world_size: int = 1) -> Path:
    """Write the report to `environment.json` in `run_dir`, whole or not at all; rank 0 only.

    Returns the path of the file.
    """
    path = Path(run_dir) / ENVIRONMENT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(environment_report(world_size), indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this package is part of; None where it is installed otherwise."""
    here = Path(__file__).resolve()
    # A virtual environment may lie inside somebody else's repository: is this very file tracked?
    if _run_git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _run_git(here.parent, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _run_git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _run_git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_count() -> int:
    """Cores that this process may use, which a container or Slurm may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    import psutil

    return round(psutil.virtual_memory().total / 2**30, 1)


def _decode_kernels_problem() -> str | None:
    """Why the native decoding kernels cannot be used here; None where they can."""
    # mcore may import this room, not the other way round; this part of it needs no Megatron.
    return importlib.import_module("nested_reft_mcore.mcore.native").problem()


def _devices() -> list[dict[str, Any]]:
    """One entry for each CUDA device in sight; empty on a machine without."""
    import torch

    if not torch.cuda.is_available():
        return []
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found
