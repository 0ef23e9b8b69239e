"""examples/smollm2_mawps short of the model: its configuration fits, its split leaks nothing.

The run itself needs a download and minutes; its own check.py judges it.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nested_reft_mcore
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checks import (
    check_batches,
    check_depth,
    check_for_evaluation,
    check_for_training,
    check_for_warm_up,
    check_paths,
    check_warm_up_batches,
)
from nested_reft_mcore.config.layout import check_layout, needed_processes, stage_of_layer
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.data.jsonl import read_json_lines

EXAMPLE = Path(nested_reft_mcore.__file__).parents[1] / "examples" / "smollm2_mawps"
SMOLLM2 = ModelArchitecture(
    num_layers=30,
    hidden_size=576,
    num_attention_heads=9,
    num_query_groups=3,
    ffn_hidden_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
)
QUESTIONS = (
    ("Tom has 7 caps. He gets 7 more. How many?", 14.0, "7 + 7 = 14"),
    ("Tom has 2 caps. Now he has 1,250. How many more?", 1248.0, "1250 - 2 = 1248"),
    ("Tom runs 3 laps a minute. How long do 10 take?", 3.33333, "10 / 3 = 3.33333"),
    ("A pen is $0.75. What do 4 cost?", 3.0, "0.75 * 4 = 3"),
    ("Tom had none of the 0 pens. How many has he and Ann?", 12.0, "12"),
)


def split(tmp_path: Path, lines: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    data = tmp_path / "mawps.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, str(EXAMPLE / "split.py"), str(data), "--output", str(tmp_path)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_configuration_fits_the_model_and_two_processes(tmp_path, monkeypatch):
    config = load_config(EXAMPLE / "config.yaml")
    for check in (check_for_training, check_for_warm_up, check_for_evaluation):
        check(config)
    check_depth(config, SMOLLM2.num_layers)
    assert needed_processes(config.parallel) == 2
    assert check_layout(SMOLLM2, config.parallel, world_size=2) == 1
    check_batches(config, 1)
    check_warm_up_batches(config, 1)
    # The files it names are those that split.py writes.
    monkeypatch.chdir(tmp_path)
    output = Path("runs/smollm2_mawps")
    output.mkdir(parents=True)
    lines = [json.dumps({"input": text, "target": target}) for text, target, _ in QUESTIONS]
    assert split(output, lines, "--num-eval", "2").returncode == 0
    check_paths(config)
    assert config.data.train_path is not None
    (record, *_) = read_json_lines(config.data.train_path, None)
    assert record.text(config.data.prompt_field)
    assert record.number_or_text(config.data.answer_field)
    assert record.text(config.data.demonstration_field)


def test_every_plan_skips_two_layers_of_each_stage_and_no_sensitive_one():
    config = load_config(EXAMPLE / "config.yaml")
    stages = stage_of_layer(30, config.parallel.pipeline_model_parallel_size, 1)
    schedule = LayerSkipSchedule(
        law=config.nested.law,
        num_layers=30,
        num_skipped=num_skipped(config.nested, 30),
        border_layers=config.nested.border_layers,
        part=config.nested.part,
        stage_of_layer=stages,
        seed=config.seed,
    )
    for step in range(50):
        skipped = set(range(30)) - set(schedule.plan(step).active)
        assert Counter(stages[layer] for layer in skipped) == {0: 2, 1: 2}
        assert not skipped & {0, 1, 2, 28, 29}


def test_split_writes_calculations_and_no_question_twice(tmp_path):
    lines = [json.dumps({"input": text, "target": target}) for text, target, _ in QUESTIONS]
    lines += [json.dumps({"input": QUESTIONS[0][0].upper().replace(" ", "  "), "target": 14.0})]
    assert split(tmp_path, lines, "--num-eval", "2").returncode == 0
    train, held_out = read(tmp_path / "train.jsonl"), read(tmp_path / "eval.jsonl")
    assert (len(train), len(held_out)) == (3, 2)
    found = {line["input"].lower().replace("  ", " "): line for line in train + held_out}
    assert len(found) == len(QUESTIONS)
    for question, target, demonstration in QUESTIONS:
        line = found[question.lower()]
        assert (line["target"], line["demonstration"]) == (target, demonstration)


def test_split_refuses_a_file_of_another_kind(tmp_path):
    for lines, expected in (
        (['{"question": "1 + 1?", "target": 2}'], "`input` and `target`"),
        (["not JSON"], "`input` and `target`"),
        ([json.dumps({"input": "1 + 1?", "target": 2})], "more than 16 questions"),
    ):
        done = split(tmp_path, lines)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
