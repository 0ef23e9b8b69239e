"""`nested-reft evaluate` as a user starts it: no configuration file, killed, started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from inference_cases import read_lines, write_lines, write_model_with_tokenizer
from run_cases import finish, run, start
from typer.testing import CliRunner

from nested_reft_mcore.cli import app
from nested_reft_mcore.launch.faults import FAULT_VARIABLE

COMMAND = (
    *("evaluate", "--hf", "model", "--data", "gsm8k=rows.jsonl", "--data", "own=own.jsonl"),
    *("--num-samples", "2", "--max-new-tokens", "6", "--skip-layers", "1"),
)
MOODY = """
def judge(item):
    if item.answer == "3":
        raise ValueError("not today")
    return 1.0
"""
# The others are no part of what is right, and a place to train from is of no use here.
REWARDS = (
    "[{name: numeric_match, weight: 2}, {name: length, options: {max_tokens: 6}}, "
    "{name: 'moody.py:judge', weight: 0}]"
)
SETTINGS = (
    *(f"reward.functions={REWARDS}", "data.train_path=gone.jsonl"),
    *("rollout.max_slots=2", "seed=4"),
)
DEFAULT = Path("runs/model/evaluate")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("evaluate")
    # Weights as `generate` reads them; GSM8K's own fields, and a set with the default ones.
    write_model_with_tokenizer(room / "model")
    rows = [{"question": f"w{i} w5", "answer": f"so w1\n#### {i}"} for i in range(20, 24)]
    write_lines(room / "rows.jsonl", rows)
    write_lines(room / "own.jsonl", [{"prompt": "w9", "answer": 3}])
    (room / "moody.py").write_text(MOODY)
    return room


def test_a_killed_evaluation_goes_on_and_others_are_refused(room: Path):
    fault = {FAULT_VARIABLE: "mid-evaluation@4:0"}
    code, _, err = finish(start(room, *COMMAND, *SETTINGS, **fault))
    assert code == -signal.SIGKILL, err
    parts = list((room / DEFAULT / "parts").glob("start_*.jsonl"))
    num_kept = sum(len(read_lines(path)) for path in parts)
    assert 0 < num_kept < 30

    _, err = run(room, *COMMAND, *SETTINGS, "evaluation.temperature=0.5", code=2)
    assert "sampling.temperature was 1.0, is 0.5" in err
    assert "--restart" in err
    assert "Traceback" not in err

    out, _ = run(room, *COMMAND, *SETTINGS)
    for word in ("gsm8k", "own", "skip 1", "greedy", "avg@2", "pass@2", "maj@2", "tokens/s"):
        assert word in out
    assert f"evaluate {num_kept}/30" in out
    assert "evaluate 30/30" in out
    completions = read_lines(room / DEFAULT / "completions.jsonl")
    assert len(completions) == 5 * 2 * 3
    assert {line["answer"] for line in completions} == {"20", "21", "22", "23", "3"}
    for line in completions:
        assert line["components"].keys() == {"numeric_match", "length", "judge"}
        assert line["reward"] == line["components"]["numeric_match"]
        failed = "judge_failure" in line
        assert failed == (line["dataset"] == "own")
        assert not failed or "not today" in line["judge_failure"]
    assert any(line["components"]["length"] for line in completions)
    written = json.loads((room / DEFAULT / "metrics.json").read_text())
    assert "val-core/gsm8k/reward/greedy" in written["metrics"]
    assert written["settings"]["judged_by"] == "numeric_match"
    assert written["settings"]["weights"]["kind"] == "hf"
    assert written["environment"]["versions"]["torch"]
    assert not (room / DEFAULT / "parts").exists()
    page = CliRunner().invoke(app, ["report", str(room / DEFAULT)])
    assert page.exit_code == 0, page.output
    assert "1 recorded steps, 30 of 30 rollouts shown" in page.output
    assert sum(one["generated_tokens"] for one in written["speed"]) < sum(
        line["num_tokens"] for line in completions
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "--data", "gsm8k=rows.jsonl"), "no model: expected --hf DIR"),
        (("evaluate", "--hf", "model"), "needs held-out prompts"),
        (("evaluate", "--hf", "model", "--data", "a:b=rows.jsonl"), "no preset 'b'"),
        (("evaluate", "--hf", "model", "--data", "a b=rows.jsonl"), "'a b' is no name"),
        (("evaluate", "--hf", "model", "--data", "gsm8=rows.jsonl"), "did you mean gsm8k=rows."),
        (("evaluate", "--hf", "model", "--data", "gsm8k="), "gsm8k=: expected NAME=PATH"),
        (("evaluate", "--hf", "model", "--data", "gsm8k"), "gsm8k does not exist"),
        (("evaluate", "--hf", "model", "--data", "gsm8k=gone.jsonl"), "gone.jsonl does not exist"),
        ((*COMMAND, "--skip-layers", "77"), "--skip-layers 77"),
        ((*COMMAND, "evaluation.num_sample=3"), "did you mean `evaluation.num_samples`?"),
        ((*COMMAND, "reward.name=math_verfy"), "did you mean math_verify?"),
        ((*COMMAND, "reward.name=gone.py:judge"), "reward: gone.py does not exist"),
        ((*COMMAND, "evaluation.reward=format"), "format; expected one of math_verify"),
        ((*COMMAND, "data.selection.policy=mops"), "data.selection.policy"),
        ((*COMMAND, "data.selection.target=2"), "data.selection.target"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    room: Path, monkeypatch, capfd, keep_logging, arguments, said
):
    monkeypatch.chdir(room)
    done = CliRunner().invoke(app, arguments)
    told = done.output + capfd.readouterr().err
    assert done.exit_code == 2, told
    assert said in told
    assert "Traceback" not in told


def test_what_only_reading_can_tell_is_told_too(room: Path):
    _, err = run(room, "evaluate", "--hf", "model", "--data", "gsm8k=own.jsonl", code=2)
    assert "own.jsonl:1: no field 'question'" in err
    assert "Traceback" not in err
