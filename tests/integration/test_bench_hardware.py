"""`nested-reft bench hardware` as a person runs it: its smallest setting, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nested_reft_mcore
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.planning.hardware import load_hardware
from nested_reft_mcore.planning.report import plan_report
from nested_reft_mcore.planning.run_plan import make_plan

REPOSITORY = Path(nested_reft_mcore.__file__).parent.parent


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nested_reft_mcore", "bench", "hardware", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.distributed
def test_two_processes_write_a_profile_that_plan_reads(tmp_path: Path):
    profile, numbers = tmp_path / "mine.yaml", tmp_path / "mine.json"
    done = start("--quick", "--nproc", "2", "--output", str(profile), "--json", str(numbers))
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("matrix products", "memory", "2 processes at work", "all-reduce", "NOT MEASURED"):
        assert told in done.stdout
    found = json.loads(numbers.read_text())
    assert (found["processes"], found["nodes"], found["threads"]) == (2, 1, 1)
    assert {link["what"] for link in found["links"]} == {"all-reduce", "message"}
    for link in found["links"]:
        seconds = link["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
    read = load_hardware(str(profile))
    assert (read.name, read.kernels, read.busy_processes) == ("mine", "cpu", 2)
    assert read.assumptions.message_latency_us != 20
    config = load_config(REPOSITORY / "examples" / "cpu_demo" / "config.yaml")
    plan = make_plan(config, 1, 2, hardware=read)
    assert plan.fits
    # A machine like this one takes tenths of a second, a GPU's profile microseconds.
    assert plan.time.update > 20 * make_plan(config, 1, 2).time.update
    assert "bench hardware on" in plan_report(plan)


def test_a_mistake_starts_nothing(tmp_path: Path):
    done = start("--output", str(tmp_path / "mine.json"))
    assert done.returncode == 2
    assert "expected a name that ends in .yaml" in done.stderr
    assert "Traceback" not in done.stderr
