"""tools/calibrate_plan.py from run directories to a profile, a check and a figure."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from calibration_cases import SIZES, START, overrides, write_run

import nested_reft_mcore
from nested_reft_mcore.planning.hardware import load_hardware
from nested_reft_mcore.planning.hardware_file import profile_yaml

TOOL = Path(nested_reft_mcore.__file__).parents[1] / "tools" / "calibrate_plan.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    for size in SIZES[:2]:
        for stages in (1, 2):
            for skipped in (0, 4):
                run = root / "runs" / f"{size[0]}.pp{stages}.skip{skipped}"
                write_run(run, *overrides(size, stages, skipped, "stage_balanced", 0))
    (root / "start.yaml").write_text(profile_yaml(START, {}, "of a test"))
    return root


def test_an_unfinished_run_among_others_is_named_and_left_out(
    tool: Any, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs = tmp_path / "runs"
    shutil.copytree(study / "runs", runs)
    cut = runs / "cut"
    shutil.copytree(next(run for run in runs.iterdir()), cut)
    (cut / "metrics.jsonl").write_text("")
    words = ["--hardware", str(study / "start.yaml")]
    assert tool([str(runs), *words]) == 0
    shown = capsys.readouterr().out
    assert "left out: " in shown
    assert "cut: has fewer than two steps" in shown
    assert "fitted to 8 runs" in shown
    # Asked for by name it is a mistake.
    assert tool([str(cut), *words]) == 2


def test_it_fits_half_and_predicts_the_other(
    tool: Any, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [tmp_path / name for name in ("fitted.yaml", "check.json", "check.png")]
    words = [str(study / "runs"), "--hardware", str(study / "start.yaml"), "--hold-out", "half"]
    words += ["--simulate", "--output", str(files[0]), "--json", str(files[1])]
    assert tool([*words, "--plot", str(files[2])]) == 0
    shown = capsys.readouterr().out
    assert "fitted to 4 runs" in shown
    assert "hardly told by these runs" in shown
    assert "simulate: 4 points that were held out" in shown
    fitted = load_hardware(str(files[0]))
    assert fitted.assumptions.pass_overhead_us > 100
    assert "calibrated on 4 runs" in fitted.source
    record = json.loads(files[1].read_text())
    assert record["plan"]["median_error"] < 0.1
    assert record["simulate"]["median_error"] < 0.1
    assert {point["name"] for point in record["plan"]["points"]} == {
        "64.pp1.skip4",
        "64.pp2.skip4",
        "160.pp1.skip4",
        "160.pp2.skip4",
    }
    assert files[2].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{runs}", "--hardware", "v100"], "--hardware v100: no such profile"),
        (["{root}/nothing", "--hardware", "h100"], "nothing: no run directory"),
        (["{runs}", "--hardware", "h100", "--hold-out", "7B*"], "--hold-out 7B*: fits none of"),
        (["{runs}/64.pp1.skip0", "--hardware", "h100"], "1 runs; expected 2 or more"),
    ],
)
def test_mistakes_leave_with_2(
    tool: Any, study: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
):
    given = [word.format(runs=study / "runs", root=study) for word in words]
    assert tool(given) == 2
    assert told in capsys.readouterr().err
