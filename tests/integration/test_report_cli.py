"""`nested-reft report`: files, messages, exit codes, pictures."""

import struct
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nested_reft_mcore.cli import app

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from synthetic_run import write_run


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: not found; expected a run directory"),
        ((".",), "there are runs inside it: run"),
        (("run", "--output", "."), "--output .: is a directory"),
        (("run", "--max-megabytes", "0.01"), "--max-megabytes 0.01: expected at least 0.2"),
        (("run", "--output", "run/metrics.jsonl/x.html"), "cannot be written"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
):
    write_run(tmp_path / "run", 2, 5_000)
    monkeypatch.chdir(tmp_path)
    done = report(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_page_and_pictures_are_written_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        write_run(tmp_path / name, 50, 20_000, seed)
    done = report("a", "b", "--png")
    assert done.exit_code == 0, done.output
    assert "a: 50 recorded steps" in done.output
    assert f"report.html: {(tmp_path / 'report.html').stat().st_size / 1e6:.2f} MB" in done.output
    names = {path.name for path in (tmp_path / "report_png").iterdir()}
    assert names == {
        *("reward.png", "response_length.png", "tokens_per_second.png", "kl.png", "ess.png"),
        *("num_skipped.png", "accuracy_eval_reward_greedy.png", "step_time_a.png"),
        *("step_time_b.png", "layers_a.png", "layers_b.png", "ratio_p05.png", "truncated.png"),
    }
    for name in names:
        head = (tmp_path / "report_png" / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:24])[0] >= 900, "too coarse for print"
    # Nothing is left over, and a page is replaced.
    assert report("a", "b").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a",
        "b",
        "report.html",
        "report_png",
    ]


def test_one_run_keeps_its_page(tmp_path: Path):
    write_run(tmp_path / "run", 2, 5_000)
    done = report(tmp_path / "run", "--no-rollouts")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.html").is_file()
    assert "0 of 0 rollouts" in done.output
