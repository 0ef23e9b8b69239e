"""The page of options says what the schema says, and its examples load."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from nested_reft_mcore.config.checks import check_config, check_for_training
from nested_reft_mcore.config.load import all_fields, config_from_dict
from nested_reft_mcore.config.schema import Config

REPOSITORY = Path(__file__).parents[2]


def generator():
    path = REPOSITORY / "tools" / "make_configuration_docs.py"
    spec = importlib.util.spec_from_file_location("make_configuration_docs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_up_to_date():
    module = generator()
    page = module.PAGE.read_text()
    assert module.page_with_options(page) == page, "run tools/make_configuration_docs.py"


def test_every_row_is_whole_and_nothing_is_said_twice():
    """A default with a line break would end its row, and the table with it."""
    lines = generator().render_options().splitlines()
    assert all(line.count(" | ") >= 3 and line.endswith(" |") for line in lines if line[:2] == "| ")
    assert not any(line.startswith(("`", "{")) for line in lines)
    for line in lines:
        sentences = re.split(r"(?<=[.]) ", line)
        assert len(sentences) == len(set(sentences)), line
        # A type that has no words is written as Python shows it.
        assert not re.search(r"Annotated|FieldInfo|<class|typing\.", line), line


def test_help_helps_and_writes_nothing(monkeypatch, tmp_path, capsys):
    module = generator()
    page = tmp_path / "page.md"
    page.write_text("untouched")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["make_configuration_docs.py", "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    assert "--check" in capsys.readouterr().out
    assert page.read_text() == "untouched"


def test_check_tells_a_page_that_is_behind(monkeypatch, tmp_path):
    module = generator()
    page = tmp_path / "page.md"
    monkeypatch.setattr(module, "PAGE", page)
    page.write_text(f"{module.BEGIN}\n{module.END}")
    monkeypatch.setattr("sys.argv", ["make_configuration_docs.py", "--check"])
    assert module.main() == 1
    page.write_text(module.page_with_options(page.read_text()))
    assert module.main() == 0


def test_every_option_stands_on_the_page_with_its_docstring():
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    for key, field in all_fields(Config).items():
        assert field.description or key in Config.model_fields, f"{key} has no docstring"
        if field.description:
            assert field.description in page, key


def test_defaults_are_those_of_the_filled_section():
    """`sft.optimizer` starts from another learning rate than `optimizer`."""
    section = generator().render_options().partition("### sft.optimizer")[2].partition("###")[0]
    assert re.search(r"\| `lr` \|[^|]*\| `1e-05` \|", section)


def test_the_smallest_file_on_the_page_is_enough():
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert example is not None
    config = config_from_dict(yaml.safe_load(example.group(1)))
    check_config(config)
    check_for_training(config)


def test_paths_that_the_page_lists_are_options():
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    known = set(all_fields(Config))
    named = set(re.findall(r"`((?:model|data|rollout|train|sft|nested|parallel)\.[a-z_.]+)`", page))
    assert len(named) > 10
    assert named <= known | {"config.json"}, named - known
