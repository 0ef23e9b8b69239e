"""Options of rewards: what a user may write, and what is refused before anything starts."""

import pytest

from nested_reft_mcore.config.checks import check_paths
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.rewards import REWARD_NAMES, evaluated_measure, evaluated_place
from nested_reft_mcore.rewards.registry import REWARDS, load_reward

BASE = "run_dir: run\nmodel: {hf_path: somewhere}\n"


def load(tmp_path, *overrides: str):
    file = tmp_path / "config.yaml"
    file.write_text(BASE, encoding="utf-8")
    return load_config(file, overrides)


def test_known_names_are_those_of_the_registry_and_load():
    assert set(REWARD_NAMES) == set(REWARDS)
    needed = {"length": {"max_tokens": 5}}
    scopes = {name: load_reward(name, needed.get(name)).scope for name in REWARD_NAMES}
    assert [name for name, scope in scopes.items() if scope != "item"] == ["relative_length"]


def test_one_name_several_functions_or_none(tmp_path):
    assert [f.name for f in load(tmp_path).reward.weighted] == ["numeric_match"]
    (only,) = load(tmp_path, "reward.name=math_verify").reward.weighted
    assert (only.name, only.weight, only.metric_name) == ("math_verify", 1.0, "math_verify")
    both = load(
        tmp_path,
        "reward.functions=[{name: math_verify}, {name: 'my.module:short', weight: -0.5, "
        "label: brief, options: {most: 10}}]",
    ).reward.weighted
    assert [(f.metric_name, f.weight, f.options) for f in both] == [
        ("math_verify", 1.0, {}),
        ("brief", -0.5, {"most": 10}),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.name=math_verfy", "reward.name is 'math_verfy'.*did you mean math_verify?"),
        ("reward.name='a b:c'", "expected one of .* or module:function, or file.py:function"),
        ("reward.functions=[{nam: format}]", "`reward.functions.0.nam`; did you mean.*name`"),
        ("reward.functions=[{weight: 1}]", "`reward.functions.0.name` is missing"),
        (
            "reward.functions=[{name: length, weight: x}]",
            "functions.0.weight`: expected a.* number",
        ),
        ("reward.functions=[{name: 'a:f'}, {name: 'b:f'}]", "mean is that of reward.functions.0"),
        ("reward.functions=[{name: format, label: 'a/b'}]", "functions.0.label: expected letters"),
        ("reward.memory_limit_gb=0", "memory_limit_gb`: expected greater than 0"),
    ],
)
def test_refusals(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, override)


def test_one_way_at_a_time(tmp_path):
    with pytest.raises(UserError, match=r"reward\.name=format beside reward\.functions"):
        load(tmp_path, "reward.name=format", "reward.functions=[{name: length}]")


def test_a_missing_file_is_found_before_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somewhere").mkdir()
    config = load(tmp_path, "reward.name='mine.py:judge'")
    with pytest.raises(UserError, match=r"reward: mine.py does not exist \(taken from"):
        check_paths(config)
    (tmp_path / "mine.py").write_text("")
    check_paths(config)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("format", {"style": "box"}, "options of 'format': style is 'box'; expected one of boxed"),
        ("format", {"pattern": "("}, "is no regular expression"),
        ("length", {"max_tokens": "9"}, "option max_tokens of 'length': expected a valid integer"),
        ("exact_match", {"ignore_case": "no"}, "option ignore_case of .* a valid boolean"),
        ("relative_length", {"correct_by": "nope"}, "options of 'relative_length': .*'nope'"),
    ],
)
def test_a_value_that_every_call_would_refuse_is_refused_once(name, options, message):
    with pytest.raises(UserError, match=message):
        load_reward(name, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n1 / 0", r"ZeroDivisionError: division by zero \(.*mine\.py:2\)"),
        ("import no_such_neighbour", r"mine\.py:1\); modules are found .* on PYTHONPATH"),
        ("async def judge(item): return 1.0", "is an async function; expected a function that"),
        ("class judge:\n    def __init__(self, item): ...", "is a class; expected a function that"),
        ("def judge(item): yield 1.0", "is a generator; expected a function that"),
        ("judge = 1", "is a int; expected a function"),
    ],
)
def test_a_file_that_gives_no_function_says_where(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_reward(f"{tmp_path / 'mine.py'}:judge")


@pytest.mark.parametrize("value", ["1e999", "-1e999"])
def test_numbers_are_finite(tmp_path, value):
    with pytest.raises(UserError, match=r"functions\.0\.weight`: expected a finite number"):
        load(tmp_path, f"reward.functions=[{{name: format, weight: {value}}}]")


@pytest.mark.parametrize(
    ("names", "label", "place", "measure"),
    [
        (["numeric_match"], None, 0, "reward"),
        (["my.module:judge"], None, 0, "reward"),
        (["length"], None, 0, "length"),
        (["format", "math_verify"], None, 1, "reward"),
        (["my.module:judge", "length"], None, None, "weighted_sum"),
        (["my.module:judge", "length"], "judge", 0, "reward"),
        (["numeric_match", "exact_match"], None, None, "weighted_sum"),
        (["numeric_match", "exact_match"], "exact_match", 1, "reward"),
        (["numeric_match", "format"], "format", 1, "format"),
    ],
)
def test_what_evaluations_judge_by(tmp_path, names, label, place, measure):
    listed = ", ".join(f"{{name: '{name}'}}" for name in names)
    chosen = [] if label is None else [f"evaluation.reward={label}"]
    config = load(tmp_path, f"reward.functions=[{listed}]", *chosen)
    assert evaluated_place(config.reward, config.evaluation.reward) == place
    assert evaluated_measure(config.reward, config.evaluation.reward) == measure


def test_evaluations_judge_by_a_reward_that_is_there(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.reward=acc; expected one of numeric_match"):
        load(tmp_path, "evaluation.reward=acc")
