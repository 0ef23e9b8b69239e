"""What every test shares: one thread, shapes checked at run time, and an end to what hangs."""

import faulthandler
import logging
import os
from collections.abc import Generator, Iterator

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

HARD_TIMEOUT_SECONDS = 900.0
"""pytest-timeout raises into a test after 600 s, once; what hangs again is ended here."""


def pytest_configure(config: pytest.Config) -> None:
    # The terminal's: what tests print is not captured yet.
    config.stash[_STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    _end_process_later(item.config)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    # pytest cancels the timer where a test fails.
    _end_process_later(item.config)


_STDERR = pytest.StashKey[int]()


def _end_process_later(config: pytest.Config) -> None:
    """Print where every thread stands and leave: the other worker's tests go on."""
    stderr = config.stash[_STDERR]
    faulthandler.dump_traceback_later(HARD_TIMEOUT_SECONDS, exit=True, file=stderr)


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
