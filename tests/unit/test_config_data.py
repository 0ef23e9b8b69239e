"""Data sets in the configuration and on the command line."""

import pytest
from test_config_checks import config, refusal

from nested_reft_mcore.config.data import (
    DataConfig,
    DataSource,
    data_paths,
    eval_sources,
    parse_source,
    train_sources,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import section_from_dict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gsm8k=a/b.jsonl", DataSource(path="a/b.jsonl", name="gsm8k", preset="gsm8k")),
        ("mine=a=b.csv", DataSource(path="a=b.csv", name="mine")),
        ("mine:math=a", DataSource(path="a", name="mine", preset="math")),
        ("dir/a=b.csv", DataSource(path="dir/a=b.csv")),
        ("a.csv", DataSource(path="a.csv")),
        ("x=hub:o/s", DataSource(hub="o/s", name="x")),
        ("x=hub:o/s:main@test", DataSource(hub="o/s", subset="main", split="test", name="x")),
        ("hub:o/s@test", DataSource(hub="o/s", split="test")),
    ],
)
def test_sources_of_the_command_line(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize("name", ["aime25", "gsm8k_hard", "math-easy", "own", "arithmetic"])
def test_names_of_ones_own_may_resemble_a_preset(name):
    assert parse_source(f"{name}=a") == DataSource(path="a", name=name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm8k=", "expected NAME=PATH"),
        ("=a", "expected NAME=PATH"),
        ("", "expected NAME=PATH"),
        ("x:maths=a", "no preset 'maths'; known ones: gsm8k"),
        ("x:maths=a", "did you mean math?"),
        ("gsm8=a", "'gsm8' is no preset, and nearly one; did you mean gsm8k=a"),
        ("GSM8K=a", "did you mean gsm8k=a"),
        ("math_500=a", "did you mean math500=a"),
        ("svmap=a", "did you mean svamp=a"),
        ("a b=c", "'a b' is no name"),
        ("x=hub:", "expected hub:OWNER/SET"),
    ],
)
def test_a_wrong_source_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_source(text)


def test_labels_and_places():
    assert DataSource(path="d/my file.test.jsonl").label == "my_file"
    assert DataSource(path="a", preset="math").label == "math"
    assert DataSource(hub="o/s", subset="m").place == "o/s:m@train"


def test_both_ways_of_naming_data():
    short = DataConfig(train_path="a", eval_path="b", template_path="c", template="chat")
    assert [s.path for s in (*train_sources(short), *eval_sources(short))] == ["a", "b"]
    full = DataConfig(train=(DataSource(path="a"), DataSource(hub="o/s")))
    assert dict(data_paths(full)) == {"data.train.0.path": "a"}
    assert dict(data_paths(short))["data.template_path"] == "c"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_path": "a", "train": ({"path": "b"},)}, "data.train_path and data.train are both"),
        ({"train": ({},)}, "data.train.0: expected exactly one of path and hub, found neither"),
        ({"eval": ({"path": "a", "hub": "b"},)}, "data.eval.0: expected exactly one of path"),
        ({"train": ({"path": "a", "split": "test"},)}, "data.train.0: subset and split belong to"),
        ({"train": ({"path": "a"}, {"path": "b/a.csv"})}, "two sources are called 'a'"),
        ({"train": ({"path": "a", "weight": 1}, {"path": "b"})}, "data.train: b has no weight"),
        ({"template_path": "a"}, "expected data.template: chat"),
        ({"system_prompt": "Be brief."}, "data.system_prompt is the first message of a chat"),
        (
            {"selection": {"solved_at": 0.2, "hopeless_at": 0.5}},
            "data.selection.solved_at=0.2 is not above data.selection.hopeless_at=0.5",
        ),
        ({"num_few_shot": 1}, "data.num_few_shot=1 needs data.few_shot"),
        ({"few_shot": {"path": "a"}}, "data.num_few_shot=0 takes none of them"),
        ({"few_shot_template": "{question}"}, "lacks {answer}"),
    ],
)
def test_contradictions_are_named(data, message):
    assert message in refusal(config(data=data))


def test_a_mistake_in_a_list_is_named_with_its_place():
    with pytest.raises(UserError, match=r"unknown key `train\.0\.pathh`; did you mean `.*path`"):
        section_from_dict(DataConfig, {"train": [{"pathh": "a"}]}, "here")
    with pytest.raises(UserError, match=r"`train\.0\.limit`: expected .*Read at most this many"):
        section_from_dict(DataConfig, {"train": [{"path": "a", "limit": "x"}]}, "here")
