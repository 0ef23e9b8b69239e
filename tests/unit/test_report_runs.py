"""A run directory is read as it is found, and what is odd about it is said."""

import json
from pathlib import Path

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.observability.tracking import Tracker
from nested_reft_mcore.report.intervals import accuracy_intervals, of_means, wilson
from nested_reft_mcore.report.page_data import run_data, skipped_cells
from nested_reft_mcore.report.run_record import RunRecord, read_run, read_runs


def write_metrics(directory: Path, *lines: dict[str, object], tail: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"time": 1.0, **line}) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + tail)
    return directory


def write_config(directory: Path, num_steps: int) -> None:
    (directory / "config.yaml").write_text(f"train:\n  num_steps: {num_steps}\n")


def reward(step: int, value: float, **more: object) -> dict[str, object]:
    return {"step": step, "critic/rewards/mean": value, **more}


def test_what_the_tracker_writes_is_read(tmp_path: Path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(1, {"critic/rewards/mean": 0.5}, texts={"nested/plan": "1,3.mlp"})
        tracker.log(2, {"critic/rewards/mean": float("nan")}, texts={"nested/plan": "none"})
        tracker.log(2, {"timing_s/save_checkpoint": 0.25, "checkpoint/bytes": 7.0})
    (tmp_path / "environment.json").write_text("{}")
    write_config(tmp_path, 2)
    run = read_run(tmp_path, "r")
    assert [step["step"] for step in run.steps] == [1, 2]
    assert run.plans == {1: "1,3.mlp", 2: "none"}
    # A save that is timed after its step's line belongs to it.
    assert run.steps[1]["checkpoint/bytes"] == 7.0
    assert run.metrics == ["checkpoint/bytes", "critic/rewards/mean", "timing_s/save_checkpoint"]
    assert run.notes == ["not finite: critic/rewards/mean in 1 steps"]


def test_of_repeated_steps_the_last_counts_and_stale_ones_go(tmp_path: Path):
    old = [reward(step, 0.1, **{"nested/plan": "1"}) for step in range(1, 7)]
    new = [reward(step, 0.9) for step in range(4, 6)]
    run = read_run(write_metrics(tmp_path, *old, *new), "r")
    # Step 6 was of a course that the run did not take.
    assert [step["step"] for step in run.steps] == [1, 2, 3, 4, 5]
    assert [step["critic/rewards/mean"] for step in run.steps] == [0.1, 0.1, 0.1, 0.9, 0.9]
    assert sorted(run.plans) == [1, 2, 3]
    assert any("went back 3 steps and wrote steps 4 to 6 again" in note for note in run.notes)


def test_times_after_a_line_add_up_and_do_not_repeat_the_step(tmp_path: Path):
    first = reward(3, 0.5, **{"timing_s/save_checkpoint": 1.0})
    late = {"step": 3, "timing_s/save_checkpoint": 0.5}
    run = read_run(write_metrics(tmp_path, first, late), "r")
    assert run.steps[0]["timing_s/save_checkpoint"] == 1.5
    assert run.steps[0]["critic/rewards/mean"] == 0.5
    assert not any("again" in note for note in run.notes)


def test_damage_is_counted_and_the_rest_is_shown(tmp_path: Path):
    run_dir = write_metrics(tmp_path, reward(1, 0.5), tail='{"step": 2, "cri\n\0\0\n{"step": 3')
    (run_dir / "config.yaml").write_text("train: [unclosed")
    (run_dir / "environment.json").write_text("[1]")
    (run_dir / "metrics.1.jsonl").write_text("")
    run = read_run(run_dir, "r")
    assert [step["step"] for step in run.steps] == [1]
    told = "\n".join(run.notes)
    assert "3 of its lines cannot be read" in told
    assert "config.yaml cannot be read" in told
    assert "environment.json holds no sections" in told
    assert "earlier histories of this directory are not shown: metrics.1.jsonl" in told


@pytest.mark.parametrize(
    ("requeue", "reason"), [(True, "stopped on request"), (False, "still running, or was ended")]
)
def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path, requeue: bool, reason: str):
    write_config(write_metrics(tmp_path, reward(1, 0.5)), 8)
    if requeue:
        (tmp_path / "requeue").write_text("step 1\n")
    (note,) = [n for n in read_run(tmp_path, "r").notes if n.startswith("unfinished")]
    assert "1 of 8 steps" in note
    assert reason in note


def test_a_pause_between_steps_tells_of_a_resume(tmp_path: Path):
    times = [0.0, 10.0, 20.0, 3620.0, 3630.0, 3665.0]
    lines = [
        # The last step evaluates for 25 seconds: no pause.
        {**reward(i, 0.5), "time": t, "timing_s/step": 9.5, "timing_s/testing": 25.0 * (i == 5)}
        for i, t in enumerate(times)
    ]
    (note,) = [n for n in read_run(write_metrics(tmp_path, *lines), "r").notes if "resumed" in n]
    assert "1 pauses between steps, 60 minutes" in note


def test_an_empty_run_is_a_run(tmp_path: Path):
    write_metrics(tmp_path)
    write_config(tmp_path, 8)
    run = read_run(tmp_path, "r")
    assert "no step is recorded yet" in run.notes
    assert run_data(run)["steps"] == []


def test_what_is_no_run_is_named_with_what_was_meant(tmp_path: Path):
    write_metrics(tmp_path / "runs" / "first", reward(1, 0.5))
    with pytest.raises(UserError, match="nowhere: not found; expected a run directory"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"runs inside it: .*runs/first"):
        read_runs([tmp_path / "runs"])
    # A folder with a configuration, whose runs lie deeper, is no run either.
    write_config(tmp_path, 8)
    with pytest.raises(UserError, match=r"there are runs inside it: .*runs/first"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="is a file"):
        read_runs([tmp_path / "runs" / "first" / "metrics.jsonl"])
    with pytest.raises(UserError, match="the same run as"):
        read_runs([tmp_path / "runs" / "first", tmp_path / "runs" / "first" / ".." / "first"])


def test_names_tell_runs_apart(tmp_path: Path):
    paths = [write_metrics(tmp_path / part, reward(1, 0.5)) for part in ("a/run", "b/run")]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs(paths[:1])] == ["run"]


def test_intervals_of_shares():
    # Wilson's interval of 8 of 10, as tables have it: 0.490 to 0.943.
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = of_means([0.0, 0.5, 1.0, 0.5])
    assert (low, high) == pytest.approx((0.5 - 0.4001, 0.5 + 0.4001), abs=1e-3)


def accuracy(step: int, value: float, **more: float) -> dict[str, object]:
    return {"step": step, "val-core/eval/reward/mean@2": value, **more}


def test_accuracies_have_their_own_bounds_or_those_of_the_prompts(tmp_path: Path):
    name = "val-core/eval/reward/mean@2"
    lines = [
        accuracy(1, 0.5, **{f"{name}/ci_low": 0.4, f"{name}/ci_high": 0.7}),
        accuracy(2, 0.5),
        accuracy(3, 0.5, **{"val-aux/num_prompts": 10.0}),
        {"step": 4, "critic/rewards/mean": 0.0},
        accuracy(5, 0.5),
    ]
    write_metrics(tmp_path, *lines)
    # Two prompts, one always right and one never: the samples of a prompt are one.
    rows = [{"mode": "mean@2", "prompt": f"{i // 2}", "reward": float(i < 2)} for i in range(4)]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "step_000002.jsonl").write_text(
        "\n".join(json.dumps(row) for row in rows)
    )
    run = read_run(tmp_path, "r")
    found = accuracy_intervals(run)
    assert list(found) == [name]
    assert found[name][0] == (0.4, 0.7)
    assert found[name][1] == wilson(0.5, 2)
    assert found[name][2] == wilson(0.5, 10)
    assert found[name][3:] == [None, None]
    assert f"{name}/ci_low" not in run_data(run)["metrics"]


def test_long_runs_are_thinned_and_keep_evaluations():
    steps: list[dict[str, float | None]] = [
        {"step": float(i), "time": 1.0, "a": float(i)} for i in range(10_000)
    ]
    steps[1234]["val-core/eval/reward/greedy"] = 0.5
    data = run_data(RunRecord("r", Path("r"), "train", steps))
    kept, there = data["thinned"]
    assert there == 10_000
    assert kept <= 4002
    assert len(data["steps"]) == len(data["metrics"]["a"]) == kept
    assert 1234 in data["steps"]
    assert data["steps"][-1] == 9999


def test_plans_become_cells():
    assert skipped_cells("0,2.attention,3.mlp", 5) == "30120"
    assert skipped_cells("1.attention,1.mlp", 3) == "030"
    assert skipped_cells("none", 3) == "000"
    assert skipped_cells("7,x,1.other", 3) == "000"
