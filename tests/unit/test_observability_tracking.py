"""metrics.jsonl stays valid, whole and without repeated steps, whatever happened to the run."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.observability.tracking import Tracker, read_metrics


def lines_of(run_dir: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write_steps(run_dir: Path, *steps: int, resume_step: int | None = None) -> None:
    with Tracker(run_dir, tensorboard=False, resume_step=resume_step) as tracker:
        for step in steps:
            tracker.log(step, {"critic/rewards/mean": step / 10})


def test_a_line_holds_step_time_and_numbers_of_any_kind(tmp_path: Path):
    with Tracker(tmp_path, tensorboard=False, clock=lambda: 12.5) as tracker:
        tracker.log(
            3, {"a/int": 2, "a/float": 0.5, "a/tensor": torch.tensor(1.5), "a/np": np.float32(2.5)}
        )
        # Readable at once: somebody may be following the file.
        assert lines_of(tmp_path) == [
            {"step": 3, "time": 12.5, "a/int": 2, "a/float": 0.5, "a/tensor": 1.5, "a/np": 2.5}
        ]


def test_texts_stand_in_the_line_and_are_no_metrics(tmp_path: Path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(1, {"actor/lr": 0.5}, texts={"nested/plan": "1,3.attention"})
    assert lines_of(tmp_path)[0]["nested/plan"] == "1,3.attention"
    assert read_metrics(tmp_path)[0].keys() == {"step", "time", "actor/lr"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_non_finite_is_null_and_the_line_stays_json(tmp_path: Path, value: float):
    with Tracker(tmp_path) as tracker:
        tracker.log(0, {"actor/grad_norm": value, "actor/lr": 1.0})
    (line,) = lines_of(tmp_path)
    assert line["actor/grad_norm"] is None
    assert line["actor/lr"] == 1.0


@pytest.mark.parametrize("value", ["0.5", None, [1.0], torch.zeros(2)])
def test_what_is_not_a_number_is_refused_by_name(tmp_path: Path, value: object):
    with (
        Tracker(tmp_path, tensorboard=False) as tracker,
        pytest.raises(TypeError, match="'actor/lr'"),
    ):
        tracker.log(0, {"actor/lr": value})  # type: ignore[dict-item]
    assert lines_of(tmp_path) == []


def test_reserved_names_are_refused(tmp_path: Path):
    with Tracker(tmp_path, tensorboard=False) as tracker, pytest.raises(ValueError, match="'step'"):
        tracker.log(0, {"step": 1})


def test_resume_drops_later_steps_and_keeps_all_lines_of_kept_ones(tmp_path: Path):
    write_steps(tmp_path, 1, 2, 2, 3, 4)
    write_steps(tmp_path, 3, 4, 5, resume_step=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 2, "time": 1.0, "actor',  # killed while writing
        b'{"step": 2, "ti\xe2\x82',  # in the middle of a character
        b"\x00\x00\x00\x00",  # the machine went down
        b'{"step": 2, "time": 1.0}garbage\n',
    ],
)
def test_torn_last_line_is_repaired(tmp_path: Path, tail: bytes):
    write_steps(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    write_steps(tmp_path, 2, resume_step=5)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_last_line_without_its_newline_is_kept(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}')
    write_steps(tmp_path, 2, resume_step=1)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_resume_without_a_history_starts_one(tmp_path: Path):
    write_steps(tmp_path, 4, resume_step=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [4]


def test_a_new_run_moves_old_histories_aside(tmp_path: Path):
    write_steps(tmp_path, 1, 2)
    write_steps(tmp_path, 1)
    write_steps(tmp_path, 7)
    assert [line["step"] for line in read_metrics(tmp_path)] == [7]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.1.jsonl")] == [1, 2]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.2.jsonl")] == [1]


def test_other_ranks_write_nothing(tmp_path: Path):
    run_dir = tmp_path / "run"
    with Tracker(run_dir, is_main=False, wandb_project="p") as tracker:
        tracker.log(0, {"actor/lr": 1.0})
    assert not run_dir.exists()


def test_tensorboard_hides_steps_that_a_resumed_run_wrote_again(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, value, steps in ((None, 1.0, (1, 2, 3)), (1, 2.0, (2, 3))):
        with Tracker(tmp_path, resume_step=resume_step) as tracker:
            for step in steps:
                tracker.log(step, {"actor/lr": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("actor/lr")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 2.0),
    ]


def test_wandb_that_is_absent_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb_project"):
        Tracker(tmp_path, wandb_project="project")


def test_reading_what_is_not_there_names_the_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: not found"):
        read_metrics(tmp_path)
