"""What every test shares: one thread, and shapes checked at run time where they are annotated."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything of ours is imported: annotated shapes and types become run-time checks.
install_import_hook(
    ["nested_reft_mcore.algorithm", "nested_reft_mcore.rollout"],
    # As type checkers read it: an int will do where a float is asked for.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
torch.set_num_threads(1)
# No deadline: machines that run tests are shared. Derandomised: a red run can be repeated.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


@pytest.fixture
def keep_logging() -> Iterator[None]:
    """Commands in this process set up the console; other tests want theirs."""
    root, package = logging.getLogger(), logging.getLogger("nested_reft_mcore")
    before = (list(root.handlers), root.level, package.level)
    yield
    root.handlers[:], level, package_level = before
    root.setLevel(level)
    package.setLevel(package_level)
    logging.captureWarnings(False)
