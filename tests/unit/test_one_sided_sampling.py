"""Truncation or temperature in the rollout alone: what the ratio would be, and who refuses it."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from nested_reft_mcore.algorithm.importance import correction_weights, log_importance_ratio
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.objectives import ObjectiveSettings
from nested_reft_mcore.analysis.sequence_space import SequenceSpace
from nested_reft_mcore.analysis.toy_policy import ToyPolicy, at_temperature, truncated
from nested_reft_mcore.config.checks import check_config, check_for_training
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import AlgorithmConfig, Config


@pytest.fixture(scope="module")
def tables() -> tuple[Tensor, Tensor]:
    """Next-token log-probs of a toy policy and of its nested self, one row for each prefix."""
    policy = ToyPolicy(SequenceSpace(5, 3), num_layers=4, seed=11)
    with torch.no_grad():
        return policy.table(), policy.table(LayerSkipPlan.parse("1,2", 4))


def mean_ratio(drawn: Tensor, target: Tensor, recorded: Tensor) -> Tensor:
    """`[prefixes]`: E[w] of the ratio that training would compute, the draws being `drawn`'s."""
    # Tokens as batch rows of one: nothing is truncated by a shape.
    flat = (target.flatten()[:, None], recorded.flatten()[:, None])
    mask = torch.ones_like(flat[0], dtype=torch.bool)
    weights = correction_weights("base", log_importance_ratio(*flat, mask, 20.0)).weights
    return (drawn.exp() * weights.reshape(target.shape)).sum(dim=1)


TRUNCATIONS = [{"top_k": 2}, {"top_k": 4}, {"top_p": 0.5}, {"top_p": 0.9}]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_ratio_of_truncated_draws_is_off_by_the_kept_mass(tables, truncation):
    """Recorded as drawn, E[w] is what the full target keeps on the tokens that are left: no
    correction can say what it does elsewhere."""
    target, nested = tables
    drawn = truncated(nested, **truncation)
    kept = (target.exp() * drawn.isfinite()).sum(dim=1)
    torch.testing.assert_close(mean_ratio(drawn, target, drawn), kept, rtol=1e-12, atol=1e-14)
    assert float(kept.min()) < 0.95
    # With nothing skipped too, where the ratio ought to be 1, every token's is the kept mass.
    drawn = truncated(target, **truncation)
    kept = (target.exp() * drawn.isfinite()).sum(dim=1)
    torch.testing.assert_close(mean_ratio(drawn, target, drawn), kept, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_forgetting_the_truncation_divides_by_the_behaviors_kept_mass(tables, truncation):
    """Recorded as if nothing had been cut off: off by the quotient of both masses, and blind to
    the bias where nothing is skipped, for then it is 1."""
    target, nested = tables
    drawn = truncated(nested, **truncation)
    left = drawn.isfinite()
    want = (target.exp() * left).sum(dim=1) / (nested.exp() * left).sum(dim=1)
    torch.testing.assert_close(mean_ratio(drawn, target, nested), want, rtol=1e-12, atol=1e-14)
    drawn = truncated(target, **truncation)
    ones = torch.ones_like(want)
    torch.testing.assert_close(mean_ratio(drawn, target, target), ones, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.3])
def test_a_temperature_on_one_side_biases_the_ratio_and_on_both_does_not(tables, temperature):
    target, nested = tables
    drawn = at_temperature(nested, temperature)
    ones = torch.ones(len(target), dtype=torch.float64)
    both = mean_ratio(drawn, at_temperature(target, temperature), drawn)
    torch.testing.assert_close(both, ones, rtol=1e-12, atol=1e-14)
    # The recorded probabilities forget it: the mean of the ratio is no longer 1.
    assert float((mean_ratio(drawn, target, nested) - 1).abs().max()) > 0.02
    # Drawn and recorded with it but the target without: the mean is 1 for another policy's sake,
    # and the ratio of a policy to itself is not 1.
    same = target - at_temperature(target, temperature)
    assert float(same.abs().max()) > 0.02


# --- what the configuration refuses ---


def config(**sections) -> Config:
    architecture = {
        "num_layers": 12,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 176,
        "vocab_size": 41,
    }
    return Config.model_validate(
        {"run_dir": "r", "model": {"architecture": architecture}, "data": {"train_path": "x"}}
        | sections
    )


def choices(field: str) -> tuple[str, ...]:
    return get_args(AlgorithmConfig.model_fields[field].annotation)


@pytest.mark.parametrize("mode", ["nested", "full", "speculative"])
@pytest.mark.parametrize(("name", "value"), [("top_k", 1), ("top_k", 50), ("top_p", 0.95)])
def test_training_refuses_to_draw_from_a_truncated_distribution(name, value, mode):
    rollout = {name: value, "mode": mode}
    with pytest.raises(UserError, match=rf"rollout\.{name}={value}.*off by the kept mass"):
        check_for_training(config(rollout=rollout, nested={"num_skipped": 2}))
    # `generate` and `evaluate` may: no ratio is formed there.
    check_config(config(evaluation={name: value}))
    check_for_training(config(evaluation={name: value}))


def test_one_temperature_serves_both_sides():
    """There is no second one to be set: what rollouts are drawn at is what updates divide by."""
    fields = [
        f"{section}.{field}"
        for section, value in config().model_dump().items()
        if isinstance(value, dict)
        for field in value
        if field == "temperature" and section != "evaluation"
    ]
    assert fields == ["rollout.temperature"]


@pytest.mark.parametrize("correction", choices("rollout_is"))
@pytest.mark.parametrize("objective", choices("objective"))
def test_bypass_is_refused_beside_every_correction_that_would_count_the_ratio_twice(
    objective, correction
):
    algorithm = {"objective": objective, "bypass_mode": True, "rollout_is": correction}
    if correction == "practical" and objective != "reinforce":
        check_config(config(algorithm=algorithm))
        return
    message = "none" if objective == "reinforce" else "twice"
    with pytest.raises(UserError, match=r"found objective=reinforce|would count it twice"):
        check_config(config(algorithm=algorithm))
    own = {"token": "tis", "sequence": "trajectory"}.get(correction, correction)
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(objective=objective, bypass_mode=True, correction=own)
    # Decoupled, every pair is fine.
    check_config(config(algorithm=algorithm | {"bypass_mode": False}))


def test_counting_the_ratio_twice_would_bias_its_mean(tables):
    """What the refusal is about: E[w] is 1, E[w * w] is one plus chi-squared."""
    target, nested = tables
    ratio = (target - nested).exp()
    chi_squared = (nested.exp() * (ratio - 1).square()).sum(dim=1)
    twice = (nested.exp() * ratio.square()).sum(dim=1)
    torch.testing.assert_close(twice, 1 + chi_squared, rtol=1e-12, atol=0)
    assert float(chi_squared.min()) > 0
    assert float(chi_squared.max()) > 0.1
