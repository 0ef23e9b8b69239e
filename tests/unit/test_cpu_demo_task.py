"""The arithmetic-story task of examples/cpu_demo: right answers, one token a word, no leaks."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import nested_reft_mcore
from nested_reft_mcore.config.schema import DataConfig
from nested_reft_mcore.data.demonstrations import load_demonstrations
from nested_reft_mcore.data.prompts import load_prompts
from nested_reft_mcore.data.tokenizers import load_tokenizer
from nested_reft_mcore.rewards.base import RewardItem
from nested_reft_mcore.rewards.numeric_match import numeric_match

SCRIPT = Path(nested_reft_mcore.__file__).parents[1] / "examples" / "cpu_demo" / "make_task.py"
FILES = ("train.jsonl", "eval.jsonl", "sft.jsonl")
# The verbs, stated here once more: the test must not learn the signs from what it tests.
SIGNS = dict.fromkeys(("finds", "gets", "picks", "wins"), 1) | dict.fromkeys(
    ("drops", "eats", "gives", "loses"), -1
)


def make(directory: Path, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--output", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    directory = tmp_path_factory.mktemp("task")
    return directory, make(directory)


def running_values(prompt: str) -> list[int]:
    _, start, *changes, mark = prompt.split()
    assert mark == "?"
    values = [int(start)]
    for verb, operand in zip(changes[::2], changes[1::2], strict=True):
        assert 1 <= int(operand) <= 5
        values.append(values[-1] + SIGNS[verb] * int(operand))
    return values


def test_sizes_and_report(task):
    directory, report = task
    assert [len(lines(directory / name)) for name in FILES] == [16 * 30, 256, 24 * 450]
    assert [Path(line.split(":")[0]).name for line in report.splitlines()] == [
        *FILES,
        "tokenizer.model",
    ]


def test_answers_are_right_and_values_stay_digits(task):
    for name in FILES:
        for line in lines(task[0] / name):
            values = running_values(line["prompt"])
            assert len(values) == 5
            assert all(0 <= value <= 9 for value in values)
            assert line["answer"] == values[-1]


def test_no_prompt_stands_twice(task):
    counts = Counter(line["prompt"] for name in FILES for line in lines(task[0] / name))
    assert max(counts.values()) == 1


def test_demonstrations_are_of_two_styles_and_earn_the_reward(task):
    direct = 0
    demonstrations = lines(task[0] / "sft.jsonl")
    for line in demonstrations:
        text, values = line["demonstration"], running_values(line["prompt"])
        if text.startswith("#"):
            direct += 1
            assert text == f"# {values[-1]} ,"
        else:
            assert text == "> {} , {} , {} , {}".format(*values[1:])
        assert numeric_match(RewardItem(line["prompt"], text, str(line["answer"]))) == 1.0
    assert 0.53 < direct / len(demonstrations) < 0.57


def test_every_word_is_a_token(task):
    tokenizer = load_tokenizer(task[0] / "tokenizer.model")
    assert tokenizer.vocab_size == 29
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.pad_token_id == 0
    texts = [
        line[key]
        for name in FILES
        for line in lines(task[0] / name)
        for key in ("prompt", "demonstration")
        if key in line
    ]
    assert len({word for text in texts for word in text.split()}) == 29 - 3
    unknown = tokenizer.token_to_id("<unk>")
    for text in texts:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert unknown not in ids
        assert tokenizer.decode([*ids, 2]) == text
    assert tokenizer.decode(tokenizer.encode("8 , 6")) == "8 , 6"
    assert re.fullmatch(r"\w+( \d \w+)+ \d \?", texts[0])


def test_the_package_reads_what_was_written(task):
    tokenizer = load_tokenizer(task[0])
    prompts = load_prompts(task[0] / "train.jsonl", DataConfig(), tokenizer)
    assert {len(prompt.token_ids) for prompt in prompts.prompts} == {11}
    demonstrations = load_demonstrations(task[0] / "sft.jsonl", DataConfig(), tokenizer)
    assert {len(item.response_ids) for item in demonstrations.demonstrations} == {4, 9}


def test_the_seed_decides_everything(tmp_path):
    sizes = ("--num-train", "20", "--num-eval", "5", "--num-demonstrations", "30")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        make(tmp_path / name, "--seed", seed, *sizes)
    for file in (*FILES, "tokenizer.model"):
        content = [(tmp_path / name / file).read_bytes() for name in "abc"]
        assert content[0] == content[1]
        assert (content[0] == content[2]) == (file == "tokenizer.model")
