"""The check of data sets finds what is broken, double or leaks."""

import json
from pathlib import Path

import pytest
from test_data_sources import write
from test_prompts import ByteTokenizer
from typer.testing import CliRunner

from nested_reft_mcore.cli import app
from nested_reft_mcore.config.data import DataConfig, DataSource
from nested_reft_mcore.data.check import check_data_sets
from nested_reft_mcore.data.overlap import (
    find_duplicates,
    find_overlap,
    question_key,
    report_overlap,
)
from nested_reft_mcore.data.prompt import Prompt

SHARED = Path(__file__).parents[3] / "shared" / "data"


def prompt(question, source=""):
    return Prompt((1,), f"<user>{question}", "1", source, question=question)


def test_questions_are_compared_without_case_spacing_and_forms_of_characters():
    assert question_key(" What\tis\n\uff11 + 2 ?") == question_key("what IS 1 + 2 ?")
    assert question_key("The bus . Who is left ?") == question_key("the bus Who is left?")
    assert question_key("is 1.5 so?") != question_key("is 15 so?")
    assert question_key("Compute 5!.") != question_key("Compute 5.")
    assert question_key("1 + 2") != question_key("1 + 3")


def test_overlap_and_duplicates_name_both_places(caplog):
    training = [prompt("A", "t:1"), prompt("b", "t:2"), prompt(" a", "t:3"), prompt("c", "t:4")]
    held_out = [prompt("x", "e:1"), prompt("B", "e:2"), prompt("b", "e:3")]
    assert [(a.source, b.source) for a, b in find_duplicates(training)] == [("t:3", "t:1")]
    assert [(a.source, b.source) for a, b in find_overlap(training, held_out)] == [("t:2", "e:2")]
    metrics = report_overlap(training, held_out)
    assert metrics == {"data/num_duplicates": 1.0, "data/num_eval_overlap": 1.0}
    assert "1 training prompts are also evaluated on: t:2 = e:2" in caplog.text


def check(*arguments, code=0):
    done = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def room(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": n} for n in range(4)]
    write(tmp_path / "train.csv", [*rows, rows[0], {"prompt": "", "answer": 1}])
    write(tmp_path / "eval.json", [{"prompt": "P2", "answer": 2, "level": 3}])
    return tmp_path


def test_the_command_reports_counts_and_places(room):
    files = ("--train", f"a={room / 'train.csv'}", "--eval", room / "eval.json")
    output = check(*files, "data.broken_rows=skip")
    assert (
        "5 prompts; 1 broken rows, longest length not checked: no tokenizer, 0 without answer, "
        "1 duplicates" in output
    )
    assert f"broken: {room / 'train.csv'}:7: no field 'prompt'" in output
    assert "characters: least 2, median 2, 95% 2, most 2" in output
    assert f"{room / 'train.csv'}:6 = {room / 'train.csv'}:2" in output
    assert f"{room / 'train.csv'}:4 = {room / 'eval.json'}:row 1" in output
    report = json.loads(check(*files, "--json", "--strict", code=1))
    (broken,) = report["train"][0]["broken"]
    assert (broken["file"], broken["line"]) == (str(room / "train.csv"), 7)
    assert broken["reason"].startswith("no field 'prompt'")
    assert report["train"][0]["num_dropped"] is None
    assert report["overlap"] == [[f"{room / 'train.csv'}:4", f"{room / 'eval.json'}:row 1"]]
    check("--eval", room / "eval.json", "--strict")


def test_it_leaves_with_1_where_train_would_refuse(tmp_path):
    """And lists every broken row for machines, the first ones for people."""
    path = tmp_path / "rows.jsonl"
    good, bad = '{"prompt": "How many?", "answer": 1}\n', '{"prompt": "x"}\n'
    path.write_text(good + bad * 8, encoding="utf-8")
    output = check("--train", path, code=1)
    assert f"train would refuse: {path}: 8 broken rows, and data.broken_rows is error" in output
    assert output.count("broken: ") == 5
    assert "and 3 more broken rows; --json has all of them" in output
    report = json.loads(check("--train", path, "--json", code=1))
    assert [row["line"] for row in report["train"][0]["broken"]] == list(range(2, 10))
    check("--train", path, "data.broken_rows=skip")
    check("--train", path, "data.broken_rows=skip", "--strict", code=1)


def test_prompts_that_are_too_long_for_train_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a b c", "answer": 1}\n{"prompt": "a", "answer": 1}\n')
    source = DataSource(path=str(path))
    config = DataConfig(max_prompt_length=3, overlong_prompts="error")
    report = check_data_sets([source], [], config, ByteTokenizer())
    assert report.train[0].num_dropped == 1
    assert report.refusals == (
        f"{path}: 1 prompts longer than data.max_prompt_length = 3, and data.overlong_prompts is "
        "error",
    )
    for policy in ("drop", "truncate_left"):
        config = DataConfig(max_prompt_length=3, overlong_prompts=policy)
        assert check_data_sets([source], [], config, ByteTokenizer()).refusals == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to check"),
        (("--train", "gsm8k=gone.jsonl"), "gone.jsonl: cannot be read"),
        (("--train", "gsm8=a.jsonl"), "'gsm8' is no preset, and nearly one; did you mean gsm8k="),
        (("--train", "a", "run_dir=x"), "expected data.field=value"),
        (("--train", "a", "data.limits=3"), "did you mean `limit`"),
    ],
)
def test_mistakes_leave_with_2(arguments, message, capfd, keep_logging):
    output = check(*arguments, code=2)
    assert message in output + capfd.readouterr().err


@pytest.mark.skipif(not (SHARED / "math").is_dir(), reason="the real data sets are not here")
def test_the_question_that_math_trains_and_tests_on_is_found():
    report = json.loads(
        check(
            *("--train", f"math={SHARED / 'math' / 'train.parquet'}"),
            *("--eval", f"math={SHARED / 'math' / 'test.parquet'}", "--json"),
        )
    )
    assert [[place.rpartition(":")[2] for place in pair] for pair in report["overlap"]] == [
        ["row 2949", "row 4657"]
    ]
