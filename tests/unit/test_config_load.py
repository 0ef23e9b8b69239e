"""Every mistake in a configuration is one clear message, and a good one loads as written."""

import subprocess
import sys
from pathlib import Path

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import (
    all_fields,
    config_from_dict,
    dump_config,
    load_config,
    parse_override,
)
from nested_reft_mcore.config.schema import Config

MINIMAL = """\
run_dir: runs/first
model:
  hf_path: models/tiny
"""


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_minimal_file_gets_every_default(write):
    config = load_config(write(MINIMAL))
    assert config == Config.model_validate(
        {"run_dir": "runs/first", "model": {"hf_path": "models/tiny"}}
    )


def test_relative_paths_stay_as_written(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    config = load_config(write(MINIMAL))
    assert (config.run_dir, config.model.hf_path) == ("runs/first", "models/tiny")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optimizer.lr=1e-4", lambda c: c.optimizer.lr == 1e-4),
        ("optimizer.lr=.5E-3", lambda c: c.optimizer.lr == 0.5e-3),
        ("optimizer.lr=1", lambda c: c.optimizer.lr == 1.0),
        ("rollout.stop_tokens=[a, '7']", lambda c: c.rollout.stop_tokens == ("a", "7")),
        ("logging.progress=off", lambda c: c.logging.progress == "off"),
        ("logging.tensorboard=false", lambda c: c.logging.tensorboard is False),
        ("data.prompt_suffix='a=b'", lambda c: c.data.prompt_suffix == "a=b"),
        ("nested.num_skipped=3", lambda c: c.nested.num_skipped == 3),
        ("run_dir=2026-08-01", lambda c: c.run_dir == "2026-08-01"),
        ("data.limit=", lambda c: c.data.limit is None),
    ],
)
def test_overrides_are_read_as_yaml(write, override, read):
    assert read(load_config(write(MINIMAL + "data:\n  limit: 5\n"), [override]))


def test_the_last_override_wins_over_file_and_earlier_ones(write):
    path = write(MINIMAL + "seed: 1\n")
    assert load_config(path, ["seed=2", "seed=3"]).seed == 3


def test_overrides_can_make_a_section_in_place_of_null(write):
    path = write("run_dir: r\nmodel: {hf_path: x, architecture: null}\n")
    sizes = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "vocab_size": 41,
    }
    overrides = [f"model.architecture.{name}={size}" for name, size in sizes.items()]
    config = load_config(path, ["model.hf_path=null", *overrides])
    assert config.model.architecture is not None
    assert config.model.architecture.vocab_size == 41


def test_missing_file_and_directory(tmp_path):
    assert message(tmp_path / "no.yaml") == (
        f"{tmp_path}/no.yaml: no such file; expected a YAML configuration"
    )
    assert "is a directory" in message(tmp_path)


def test_not_yaml_names_file_and_line(write):
    path = write("run_dir: a\nmodel: {hf_path: [1, 2\nseed: 1\n")
    assert message(path).startswith(f"{path}:3: not valid YAML")


@pytest.mark.parametrize(
    "text", ["run_dir: \x07\n", "run_dir: !!python/name:os.system x\n", "a: *b\n"]
)
def test_odd_yaml_is_refused(write, text):
    assert "not valid YAML" in message(write(text))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"run_dir: \xff\xfe\n")
    assert "not a text file" in message(path)


def test_duplicate_key_names_both_lines(write):
    path = write(MINIMAL + "rollout:\n  group_size: 4\n  top_k: 3\n  group_size: 8\n")
    assert message(path) == f"{path}:7: `rollout.group_size` is already set at line 5"


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_top_level_must_be_sections(write, text):
    assert "expected sections" in message(write(text))


def test_unknown_key_names_the_nearest_in_its_section(write):
    path = write(MINIMAL + "rollout:\n  grop_size: 4\n")
    assert message(path) == (
        f"{path}:5: unknown key `rollout.grop_size`; did you mean `rollout.group_size`?"
    )


def test_unknown_key_finds_its_namesake_in_another_section(write):
    assert "did you mean `rollout.group_size`?" in message(write(MINIMAL), "nested.group_size=4")


def test_unknown_section_and_hopeless_key(write):
    assert "did you mean `rollout`?" in message(write(MINIMAL + "rolout: {}\n"))
    assert "known here: skip_ratio, num_skipped, law" in message(write(MINIMAL), "nested.qqq=4")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.group_size=many", ("`rollout.group_size`", "valid integer", 'text "many"')),
        ("rollout.group_size='8'", ("valid integer", 'text "8"')),
        ("rollout.group_size=true", ("valid integer", "boolean true")),
        ("rollout.group_size=8.0", ("valid integer", "number 8.0")),
        ("rollout.group_size=0", ("greater than 0", "integer 0")),
        ("rollout.group_size=", ("valid integer", "nothing (null)")),
        ("logging.tensorboard=1", ("valid boolean", "integer 1")),
        ("model.dtype=float16", ("'float32' or 'bfloat16'", 'text "float16"')),
        ("rollout=3", ("`rollout`", "object", "integer 3")),
        ("rollout.stop_tokens=a", ("valid array", 'text "a"')),
        ("run_dir=7", ("valid string", "integer 7")),
    ],
)
def test_wrong_type_says_what_was_found_expected_and_meant(write, override, parts):
    text = message(write(MINIMAL), override)
    assert text.startswith(f"override {override!r}: ")
    assert all(part in text for part in parts), text
    field = all_fields(Config)[override.partition("=")[0]]
    assert field.description is None or field.description in text


def test_wrong_type_in_the_file_names_its_line(write):
    path = write(MINIMAL + "seed: abc\n")
    assert message(path).startswith(f"{path}:4: `seed`: expected a valid integer")


def test_required_key_missing(write):
    path = write("model: {hf_path: x}\n")
    assert message(path) == (
        f"{path}: `run_dir` is missing (Directory of everything that the run writes.)"
    )


def test_all_mistakes_are_told_at_once(write):
    text = message(write("sed: 1\nrollout: {group_size: x}\n"))
    for key in ("`run_dir` is missing", "`model` is missing", "`sed`", "`rollout.group_size`"):
        assert key in text


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ".seed=1", "seed=[1"])
def test_malformed_overrides(write, override):
    assert override in message(write(MINIMAL), override)


def test_override_below_a_value(write):
    assert "`seed` is a value, not a section" in message(write(MINIMAL + "seed: 1\n"), "seed.x=3")


def test_contradictions_name_the_file(write):
    path = write(MINIMAL + "nested: {skip_ratio: 0.1, num_skipped: 2}\n")
    assert message(path).startswith(f"{path}: nested: ")


def test_dump_and_load_give_the_same(write, tmp_path):
    tricky = ["data.prompt_suffix='1e-4'", "run_dir='off'", "optimizer.lr=1e-7", "seed=12"]
    config = load_config(write(MINIMAL), [*tricky, "rollout.stop_tokens=['3', 'null', '<<']"])
    dump_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(tmp_path / "deep" / "config.yaml") == config
    assert config.data.prompt_suffix == "1e-4"


def test_config_from_dict_checks_as_a_file_does(write):
    config = load_config(write(MINIMAL))
    assert config_from_dict(config.model_dump(mode="json")) == config
    broken = config.model_dump(mode="json") | {"sed": 1}
    with pytest.raises(UserError, match="step_5: unknown key `sed`"):
        config_from_dict(broken, "step_5")


def test_merge_keys_are_no_duplicates(write):
    path = write(
        "run_dir: r\nmodel: {hf_path: x}\noptimizer: &o {lr: 1e-3, clip_grad: 2}\n"
        "sft:\n  optimizer:\n    <<: *o\n    lr: 5e-3\n"
    )
    config = load_config(path)
    assert (config.sft.optimizer.lr, config.sft.optimizer.clip_grad) == (5e-3, 2.0)


def test_parse_override_splits_at_the_first_equals_sign():
    assert parse_override("a.b=c=d") == ("a.b", "c=d")


def test_config_imports_without_torch():
    code = (
        "import sys, pkgutil, importlib, nested_reft_mcore.config as c\n"
        "for module in pkgutil.iter_modules(c.__path__):\n"
        "    importlib.import_module(f'{c.__name__}.{module.name}')\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
