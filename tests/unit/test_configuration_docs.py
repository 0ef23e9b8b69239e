"""The page of options says what the schema says, and its examples load."""

import importlib.util
import re
from pathlib import Path

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
