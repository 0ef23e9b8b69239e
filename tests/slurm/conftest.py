"""A cluster for the session: one that answers already, else one of our own, else tests skip."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, slurm_cluster, why_not

NUM_NODES = 4


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Four nodes that declare 8 GPUs and 64 CPUs each, which no other session uses."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with slurm_cluster(NUM_NODES) as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def any_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Point this process to our own cluster where it sees no other."""
    if why_not() or _answers():
        yield
        return
    os.environ["SLURM_CONF"] = str(request.getfixturevalue("cluster").conf)
    yield
    del os.environ["SLURM_CONF"]


def _answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
