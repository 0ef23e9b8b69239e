"""Rollouts are replayed as they were sampled, at their temperature, or not at all."""

import pytest

from nested_reft_mcore.config.checks import check_for_training
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import dump_config
from nested_reft_mcore.config.schema import Config, DataConfig, ModelConfig, RolloutConfig


def config_of(tmp_path, temperature, replay=None):
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(hf_path="model"),
        data=DataConfig(train_path="prompts.jsonl"),
        rollout=RolloutConfig(temperature=temperature, replay=replay),
    )


def test_another_temperature_is_refused(tmp_path):
    source = tmp_path / "source"
    dump_config(config_of(tmp_path, 0.7), source / "config.yaml")
    check_for_training(config_of(tmp_path, 0.7, str(source)))
    with pytest.raises(UserError, match=r"temperature=1\.0, but .* sampled at 0\.7"):
        check_for_training(config_of(tmp_path, 1.0, str(source)))


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_truncated_distribution_is_refused(tmp_path, truncation):
    """Its log-probs are those of a renormalised distribution, which the target's are not."""
    (name, value), source = *truncation.items(), tmp_path / "source"
    base = config_of(tmp_path, 1.0)
    rollout = base.rollout.model_copy(update=truncation)
    dump_config(base.model_copy(update={"rollout": rollout}), source / "config.yaml")
    with pytest.raises(UserError, match=rf"sampled with rollout\.{name}={value} \(.*config\.yaml"):
        check_for_training(config_of(tmp_path, 1.0, str(source)))


def test_an_unknown_temperature_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml does not exist"):
        check_for_training(config_of(tmp_path, 1.0, str(tmp_path)))
