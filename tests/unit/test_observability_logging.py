"""Rank 0 speaks, others warn, noise goes and warnings stay; each case in its own process."""

import subprocess
import sys
from pathlib import Path

import pytest

import nested_reft_mcore

REPOSITORY = Path(nested_reft_mcore.__file__).parent.parent

TALK = """
import logging, warnings
from nested_reft_mcore.observability.logging import configure_logging
handlers = len(logging.getLogger().handlers)
show = warnings.showwarning
assert handlers == 0
{configure}
ours = logging.getLogger("nested_reft_mcore.training.trainer")
ours.debug("our debug")
ours.info("our info")
ours.warning("our warning")
ours.error("our error")
theirs = logging.getLogger("megatron.core.distributed")
theirs.info("their info")
theirs.warning("their warning")
warnings.warn("Apex is not installed. Falling back to Torch Norm")
warnings.warn("the loss looks wrong")
"""


def talk(configure: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TALK.format(configure=configure)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout == ""
    return done.stderr


def test_rank_zero_tells_what_happens():
    said = talk("configure_logging('info', 0, 4)")
    assert "our info" in said
    assert "WARNING our warning" in said
    assert "WARNING their warning" in said
    assert "the loss looks wrong" in said
    for hidden in ("our debug", "their info", "Apex", "[rank"):
        assert hidden not in said


def test_other_ranks_warn_with_their_rank():
    said = talk("configure_logging('info', 12, 128)")
    lines = said.splitlines()
    assert all("[rank  12] " in line for line in lines)
    assert [line.split("] ")[1].split(" ", 1)[0] for line in lines] == [
        "WARNING",
        "ERROR",
        "WARNING",
        "WARNING",
    ]
    assert "the loss looks wrong" in lines[-1]


def test_debug_hides_nothing():
    said = talk("configure_logging('debug', 0, 1)")
    for shown in ("our debug", "their info", "Apex is not installed", "the loss looks wrong"):
        assert shown in said


def test_debug_is_for_rank_zero_only():
    said = talk("configure_logging('debug', 1, 2)")
    assert "their warning" in said
    for hidden in ("our debug", "our info", "their info"):
        assert hidden not in said


def test_warning_level_is_quiet():
    said = talk("configure_logging('warning')")
    assert "our info" not in said
    assert "our warning" in said


def test_second_call_replaces_the_first():
    said = talk("configure_logging('debug'); configure_logging('info')")
    assert said.count("our info") == 1
    assert "our debug" not in said


def test_import_changes_nothing():
    said = talk("assert warnings.showwarning is show and not logging.getLogger().handlers")
    assert "our info" not in said
    assert "Apex is not installed" in said


def test_an_error_is_never_noise():
    said = talk("configure_logging(); logging.getLogger('x').error('Apex is not installed')")
    assert "ERROR Apex is not installed" in said


@pytest.mark.parametrize("arguments", ["'loud'", "'info', 2, 2", "'info', -1, 2"])
def test_impossible_settings_are_refused(arguments: str):
    said = talk(
        f"try:\n    configure_logging({arguments})\nexcept ValueError:\n    print_ok = 1\n"
        "else:\n    raise SystemExit('accepted')"
    )
    assert "our info" not in said
