"""What has become of a run, here and in a queue, and what `run` does about it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from study_cases import grid_in, write_run, write_study

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.studies import queue
from nested_reft_mcore.studies.commands import main
from nested_reft_mcore.studies.grid import Grid, StudyRun
from nested_reft_mcore.studies.prediction import cluster_of, predict
from nested_reft_mcore.studies.runner import COME_BACK, Runner, Sitting
from nested_reft_mcore.studies.states import (
    OUTPUT_FILE,
    Record,
    read_record,
    state_of,
    study_lock,
    write_record,
)
from nested_reft_mcore.studies.status import status_of, status_text
from nested_reft_mcore.studies.submission import runs_text, submit

# Writes what `train` would have written, taken from a directory aside.
WRITE = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)"
FAIL = "import sys; print('no luck'); sys.exit(3)"
# Goes on until it is asked to stop, then leaves as a run does that has saved.
SLEEP = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def kinds(grid: Grid) -> list[str]:
    return [state_of(run).kind for run in grid.runs]


def test_states_by_the_directory_alone(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, layouts=[{}], skip_ratios=[0, 0.125, 0.25, 0.375, 0.5])
    whole, half, changed, broken, _ = grid.runs
    write_run(whole)
    write_run(half, steps=2)
    write_run(changed)
    write_run(broken, steps=1)
    write_record(broken.directory, Record(1.0, 4, 9.0))
    assert kinds(grid) == ["finished", "stopped", "finished", "broken", "missing"]
    assert state_of(half).step == 2
    told = state_of(broken).describe(4)
    assert told == f"broken at step 1 of 4: exit code 4, see {broken.directory / OUTPUT_FILE}"
    # Without its checkpoints a run is finished if its process ended well.
    (whole.directory / "checkpoints" / "latest").unlink()
    assert state_of(whole).kind == "stopped"
    write_record(whole.directory, Record(1.0, 0, 9.0))
    assert state_of(whole).kind == "finished"


def test_a_run_with_other_options_is_stale(tmp_path: Path) -> None:
    before = grid_in(tmp_path)
    for run in before.runs:
        write_run(run)
    now = grid_in(tmp_path, overrides={"optimizer.lr": 0.5, "logging.level": "warning"})
    assert {state_of(run).detail for run in now.runs} == {"optimizer.lr changed since it was run"}
    # How a run tells of itself changes nothing of what it measures.
    assert set(kinds(grid_in(tmp_path, overrides={"logging.level": "warning"}))) == {"finished"}


GARBAGE = {
    "no json\n": "metrics.jsonl:6: cannot be read: Expecting value",
    "\x00\x07\n": "metrics.jsonl:6: cannot be read",
    '["a list"]\n': "metrics.jsonl:6: expected metrics of a step",
}


@pytest.mark.parametrize("line", GARBAGE)
def test_metrics_that_cannot_be_read_are_named_by_line(tmp_path: Path, line: str) -> None:
    (run,) = grid_in(tmp_path, layouts=[{}], skip_ratios=[0]).runs
    write_run(run, evaluations={0: 0.5})
    assert state_of(run).kind == "finished"
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write(line)
    state = state_of(run)
    assert (state.kind, state.is_damaged) == ("broken", True)
    assert GARBAGE[line] in state.detail


def test_steps_that_are_missing_are_named(tmp_path: Path) -> None:
    (run,) = grid_in(tmp_path, layouts=[{}], skip_ratios=[0]).runs
    write_run(run)
    path = run.directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    assert state_of(run).detail == f"{path}: 2 of 4 steps are missing, such as 3"
    path.unlink()
    assert "metrics.jsonl: cannot be read: No such file" in state_of(run).detail


def test_a_run_without_metrics_is_broken_and_set_aside_on_retry(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, layouts=[{}])
    made = made_aside(grid, tmp_path / "made")
    sit(grid, made, WRITE)
    first, second = grid.runs
    (first.directory / "metrics.jsonl").write_bytes(b"garbage\n")
    sitting, said = sit(grid, made, WRITE)
    assert (sitting.broken, sitting.finished) == ([first.name], [second.name])
    assert any(f"{first.directory}/metrics.jsonl:1: cannot be read" in line for line in said)
    assert (first.directory / "metrics.jsonl").read_bytes() == b"garbage\n"
    assert status(grid)[first.name].kind == "broken"
    sitting, said = sit(grid, made, WRITE, retry=True)
    assert len(sitting.finished) == 2
    aside = first.directory.with_name(f"{first.name}.old_1")
    assert (aside / "metrics.jsonl").read_bytes() == b"garbage\n"
    assert any(f"what there was is now {aside.name}" in line for line in said)
    # One that ends well and leaves nothing that can be read has not finished.
    (made / first.name / "metrics.jsonl").write_text("garbage\n")
    aside = first.directory.rename(tmp_path / "elsewhere")
    sitting, _ = sit(grid, made, WRITE)
    assert sitting.broken == [first.name]


def sit(grid: Grid, root: Path, script: str, *, retry: bool = False, limit: int | None = None):
    """One call of `run` whose runs are a script; what it has done and said."""
    said: list[str] = []

    def command(run: StudyRun) -> list[str]:
        return [sys.executable, "-c", script, str(root / run.name), str(run.directory)]

    runner = Runner(grid, said.append, command)
    return runner.run(grid.runs, retry=retry, limit=limit), said


def made_aside(grid: Grid, root: Path) -> Path:
    """What the runs of a grid are to write."""
    for run in grid.runs:
        write_run(run)
        (root / run.name).parent.mkdir(parents=True, exist_ok=True)
        run.directory.rename(root / run.name)
    return root


def test_finished_runs_are_never_repeated(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, layouts=[{}])
    made = made_aside(grid, tmp_path / "made")
    sitting, said = sit(grid, made, WRITE, limit=1)
    assert (len(sitting.finished), sitting.left) == (1, 1)
    first = grid.runs[0].directory / "config.yaml"
    stamp = first.stat().st_mtime_ns
    sitting, said = sit(grid, made, WRITE)
    assert (len(sitting.finished), sitting.broken, sitting.stale) == (2, [], [])
    assert said[0] == "1 runs to go, 1 finished earlier"
    assert said[1].startswith(f"[1/1] {grid.runs[1].name}  left 0:00:")
    assert first.stat().st_mtime_ns == stamp
    assert grid.runs[1].directory.joinpath("checkpoints", "latest").exists()


def test_broken_and_stale_runs_wait_for_retry(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, layouts=[{}])
    made = made_aside(grid, tmp_path / "made")
    sitting, said = sit(grid, made, FAIL)
    assert sitting.broken == [run.name for run in grid.runs]
    log = grid.runs[0].directory / OUTPUT_FILE
    assert any(f"exit code 3, see {log}" in line for line in said)
    assert log.read_text() == "no luck\n"
    sitting, said = sit(grid, made, WRITE)
    assert (len(sitting.broken), sitting.finished) == (2, [])
    assert any("left alone, --retry runs it again" in line for line in said)
    sitting, _ = sit(grid, made, WRITE, retry=True)
    assert len(sitting.finished) == 2
    changed = grid_in(tmp_path, layouts=[{}], overrides={"optimizer.lr": 0.5})
    again = made_aside_of_changed(changed, tmp_path / "again")
    sitting, _ = sit(changed, again, WRITE)
    assert len(sitting.stale) == 2
    sitting, _ = sit(changed, again, WRITE, retry=True)
    assert len(sitting.finished) == 2
    assert grid.runs[0].directory.with_name(f"{grid.runs[0].name}.old_1").is_dir()


def made_aside_of_changed(grid: Grid, root: Path) -> Path:
    """The same, with the runs that are there left where they are."""
    kept = [(run, run.directory.with_name("kept_" + run.name)) for run in grid.runs]
    for run, place in kept:
        run.directory.rename(place)
    made_aside(grid, root)
    for run, place in kept:
        place.rename(run.directory)
    return root


def test_checkpoints_are_removed_on_request(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, layouts=[{}], keep_checkpoints=False)
    sit(grid, made_aside(grid, tmp_path / "made"), WRITE)
    assert not any((run.directory / "checkpoints").exists() for run in grid.runs)
    assert kinds(grid) == ["finished", "finished"]


def test_an_interrupt_leaves_the_run_to_be_resumed(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, layouts=[{}])
    first = grid.runs[0]
    found: dict[str, object] = {}

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / first.name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        (state,) = {s.kind for n, s in status(grid).items() if n == first.name}
        found["state"] = state
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    sitting, said = sit(grid, tmp_path, SLEEP)
    thread.join()
    assert found["state"] == "running"
    assert sitting == Sitting(interrupted=first.name)
    assert said[-1] == f"stopped  {first.name}: the same command goes on from here"
    record = read_record(first.directory)
    assert record is not None
    assert record.exit_code == COME_BACK
    assert kinds(grid) == ["stopped", "missing"]


def test_two_of_a_study_do_not_run_at_once(tmp_path: Path) -> None:
    grid = grid_in(tmp_path)
    with study_lock(grid.output), pytest.raises(UserError, match="another process runs"):
        sit(grid, tmp_path, FAIL)
    assert kinds(grid) == ["missing"] * 5


def status(grid: Grid):
    return status_of(grid, predict(grid.runs, cluster_of(grid.study.cluster, grid.path)))


def test_status_knows_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = [0, 0.125, 0.25, 0.375, 0.5, 0.625]
    grid = grid_in(tmp_path, skip_ratios=ratios, laws=["uniform"], layouts=[{}, {"pp": 4}])
    runs = [run for run in grid.runs if run.point.pp == 1]
    write_run(runs[0])
    write_run(runs[1], steps=3)
    notes = {"job": "71", "log": "/logs/%A_%a.log", "submitted": time.time()}
    place = grid.output / queue.SUBMISSIONS
    place.mkdir()
    names = [run.name for run in runs[:5]]
    (place / "001.json").write_text(json.dumps({**notes, "runs": names}))
    known = {"71_0": "COMPLETED", "71_1": "RUNNING", "71_2": "PENDING", "71_3": "NODE_FAIL"}
    monkeypatch.setattr(queue, "slurm_states", lambda jobs: known if jobs == ["71"] else {})
    states = status(grid)
    told = [states[run.name].describe(run.num_steps) for run in runs]
    assert told == [
        "finished",
        "running, step 3 of 4: job 71_1",
        "queued: job 71_2",
        "broken at step 0 of 4: job 71_3 NODE_FAIL, see /logs/71_3.log",
        "broken at step 0 of 4: job 71_4 ended, and Slurm does not say how, see /logs/71_4.log",
        "not started",
    ]
    assert {states[r.name].kind for r in grid.runs if r.point.pp == 4} == {"does not fit"}
    assert "6 does not fit" in status_text(grid, states)


def test_what_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = [{}, {"pp": 2}, {"pp": 4}]
    grid = grid_in(tmp_path, skip_ratios=[0], layouts=layouts, seeds=[0, 1, 2])
    write_run(next(run for run in grid.runs if run.point.pp == 1))
    cluster = cluster_of(grid.study.cluster, grid.path)
    predictions = predict(grid.runs, cluster)
    monkeypatch.chdir(Path(__file__).parents[2])

    def call(dry_run: bool) -> int:
        return submit(
            grid,
            grid.runs,
            predictions,
            cluster,
            max_running=4,
            retry=False,
            dry_run=dry_run,
            options=["--time=1:00:00"],
        )

    assert call(dry_run=True) == 0
    out = capsys.readouterr().out
    two, one = (line for line in out.splitlines() if line.startswith("sbatch"))
    # An array for each shape: two runs of one process are left, and three of two.
    assert "--array=0-1%2" in one
    assert "--array=0-2%3" in two
    assert "--nodes=1 --ntasks-per-node=2 --gpus-per-node=2" in two
    assert "--time=1:00:00 slurm/sweep.sh --study" in one
    assert out.count("left out: ") == 3
    assert out.count("does not fit: needs 4 GPUs; 1 x 2 are there") == 3
    assert not (grid.output / queue.SUBMISSIONS).exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not found; expected a machine of a Slurm"):
        call(dry_run=False)


def test_a_line_for_each_task(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, overrides={"data.prompt_suffix": " a 'b' \"$(c)\" * \n"})
    lines = runs_text(grid.runs).splitlines()
    assert len(lines) == len(grid.runs)
    for run, line in zip(grid.runs, lines, strict=True):
        place, config, *words = line.split("\t")
        assert (place, config) == (str(run.directory), str(tmp_path / "config.yaml"))
        assert words[:-1] == list(run.words)
        assert words[-1] == f"run_dir={json.dumps(place)}"


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def leaves_with(*arguments: str) -> object:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        return left.value.code

    path = str(write_study(tmp_path, layouts=[{}]))
    assert leaves_with("plan", path, "--json", str(tmp_path / "plan.json")) == 0
    assert len(json.loads((tmp_path / "plan.json").read_text())["runs"]) == 2
    assert leaves_with("plan", path, "--gpu-memory", "3.5") == 0
    assert leaves_with("status", path) == 0
    capsys.readouterr()
    assert leaves_with("report", path) == 2
    assert "no run is finished, of 2" in capsys.readouterr().err
    assert leaves_with("plan", str(tmp_path / "none.yaml")) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
    assert leaves_with("run", path, "--only", "nobody") == 2
    for run in grid_in(tmp_path, layouts=[{}]).runs:
        write_run(run)
    assert leaves_with("run", path) == 0
    assert "0 runs to go, 2 finished earlier" in capsys.readouterr().out
    write_study(tmp_path, layouts=[{}], overrides={"optimizer.lr": 0.5})
    assert leaves_with("status", path) == 1
    assert leaves_with("run", path) == 1
