"""mpi4py, and the MPI library behind it; imported without starting MPI, and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

from nested_reft_mcore.config.errors import UserError

_INSTALL = "pip install 'nested_reft_mcore[mpi]'"


def load_mpi(kind: str) -> Any:
    """mpi4py's MPI module, not started yet, and not to be ended by itself.

    Args:
        kind: openmpi or mpich, the MPI that the mpirun belongs to, where the user says nothing
            else with MPI4PY_MPIABI or MPI4PY_LIBMPI.

    Raises:
        UserError: mpi4py is not installed, or does not find its library.
    """
    try:
        import mpi4py
    except ModuleNotFoundError:
        raise UserError(
            "mpirun: mpi4py is not installed; expected it, to tell every process where rank 0 is: "
            f"{_INSTALL}; or start with torchrun, srun or alone"
        ) from None
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    # One wheel of mpi4py serves both; on a machine with both MPIs it would guess.
    guided = not {"MPI4PY_MPIABI", "MPI4PY_LIBMPI"} & os.environ.keys()
    abi = os.environ.get("MPI4PY_MPIABI", kind if guided else "")
    if guided:
        os.environ["MPI4PY_MPIABI"] = kind
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun: mpi4py cannot load the MPI library (MPI4PY_MPIABI={abi}): {error}; expected "
            "the one that this mpirun belongs to; put its directory into LD_LIBRARY_PATH, or build "
            "mpi4py against it with `pip install --no-binary mpi4py mpi4py`"
        ) from error
    finally:
        if guided:
            del os.environ["MPI4PY_MPIABI"]
    return MPI


def library_name(version: str) -> str:
    """Name and number out of what MPI_Get_library_version says: `Open MPI v5.0.11`."""
    first = version.split(",")[0].splitlines()[0] if version.strip() else "an MPI without a name"
    return " ".join(first.replace("Version:", "").split())


def kind_of_mpirun() -> str:
    """openmpi or mpich, as the mpirun on the PATH says; empty if there is none that works."""
    path = shutil.which("mpirun")
    if path is None:
        return ""
    try:
        shown = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    text = shown.stdout.lower()
    if any(sign in text for sign in ("open mpi", "openrte", "prrte")):
        return "openmpi"
    return "mpich" if any(sign in text for sign in ("hydra", "mpich", "intel(r) mpi")) else ""
