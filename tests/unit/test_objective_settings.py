"""Every option of `algorithm` that the loss reads, from the configuration to the settings."""

import math
from typing import Any

import pytest
from pydantic import ValidationError
from test_config_checks import config, refusal

from nested_reft_mcore.algorithm.importance import CorrectionSettings
from nested_reft_mcore.algorithm.objectives import ObjectiveSettings
from nested_reft_mcore.algorithm.rejection import RejectionRule
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import config_from_dict
from nested_reft_mcore.training.update import objective_settings


def settings(**options: Any) -> ObjectiveSettings:
    return objective_settings(config(algorithm=options).algorithm, max_response_length=48)


@pytest.mark.parametrize(
    ("rollout_is", "threshold", "expected"),
    [
        ("practical", None, ("practical", 0.0, math.inf)),
        ("base", None, ("base", 0.0, math.inf)),
        ("retrace", None, ("retrace", 0.0, math.inf)),
        ("retrace_cumulative", None, ("retrace_cumulative", 0.0, math.inf)),
        ("trajectory", None, ("trajectory", 0.0, math.inf)),
        ("trajectory", 3, ("trajectory", 0.0, 3.0)),
        # verl's names: `sequence` is truncated, `token` has two meanings.
        ("sequence", None, ("trajectory", 0.0, 2.0)),
        ("sequence", 5.0, ("trajectory", 0.0, 5.0)),
        ("token", None, ("tis", 0.0, 2.0)),
        ("token", "0.5_5", ("icepop", 0.5, 5.0)),
        ("prefix", None, ("prefix", 0.0, math.inf)),
        ("prefix", 4, ("prefix", 0.0, 4.0)),
        ("tis", None, ("tis", 0.0, 2.0)),
        ("tis", "1.5", ("tis", 0.0, 1.5)),
        ("icepop", None, ("icepop", 0.5, 5.0)),
        ("icepop", "0.2_1", ("icepop", 0.2, 1.0)),
        ("geometric", None, ("geometric", 0.0, math.inf)),
        ("geometric", 1.2, ("geometric", 0.0, 1.2)),
    ],
)
def test_corrections_by_name_and_threshold(
    rollout_is: str, threshold: Any, expected: tuple[str, float, float]
) -> None:
    found = settings(rollout_is=rollout_is, rollout_is_threshold=threshold)
    correction = found.correction_settings
    assert (found.correction, correction.lower, correction.upper) == expected


def test_what_verl_calls_null_is_named() -> None:
    expected = "`algorithm.rollout_is`: expected a name: verl's null, .* is `practical` here, got"
    with pytest.raises(UserError, match=expected):
        config_from_dict({"algorithm": {"rollout_is": None}})


@pytest.mark.parametrize(
    ("rollout_is", "threshold", "message"),
    [
        ("retrace", 2, "rollout_is=retrace has no threshold"),
        ("icepop", 2, "icepop keeps ratios between two bounds"),
        ("sequence", "0.5_5", "has an upper bound only"),
        ("tis", "two", "rollout_is_threshold"),
        ("icepop", "0.2_0.9", "drops what is on-policy"),
        ("token", "2_5", "drops what is on-policy"),
    ],
)
def test_thresholds_that_a_correction_cannot_have(
    rollout_is: str, threshold: Any, message: str
) -> None:
    made = config(algorithm={"rollout_is": rollout_is, "rollout_is_threshold": threshold})
    with pytest.raises(UserError, match=message):
        objective_settings(made.algorithm, 1)


@pytest.mark.parametrize(
    ("names", "thresholds", "expected"),
    [
        (None, None, ()),
        ("seq_mean_k3", 0.05, (RejectionRule("seq_mean_k3", 0.05, None),)),
        ("token_k1", "0.5_2", (RejectionRule("token_k1", 2.0, 0.5),)),
        ("token_k1", 2, (RejectionRule("token_k1", 2.0, None),)),
        (
            "token_k2, seq_max_k3",
            0.5,
            (RejectionRule("token_k2", 0.5, None), RejectionRule("seq_max_k3", 0.5, None)),
        ),
        (
            "token_k1,seq_sum_k2",
            "0.5_2, 3",
            (RejectionRule("token_k1", 2.0, 0.5), RejectionRule("seq_sum_k2", 3.0, None)),
        ),
    ],
)
def test_rejections_and_their_thresholds(
    names: Any, thresholds: Any, expected: tuple[RejectionRule, ...]
) -> None:
    assert settings(rollout_rs=names, rollout_rs_threshold=thresholds).rejections == expected


@pytest.mark.parametrize(
    ("names", "threshold", "message"),
    [
        (" , ", None, "names no rejection"),
        ("token_k1", 1, "expected a number above 1"),
        ("token_k1", "2_3", "drops what is on-policy"),
        ("token_k2", "0.5_2", "upper bound only"),
    ],
)
def test_rejections_that_cannot_be_meant(names: str, threshold: Any, message: str) -> None:
    made = config(algorithm={"rollout_rs": names, "rollout_rs_threshold": threshold})
    with pytest.raises(UserError, match=message):
        objective_settings(made.algorithm, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_corrected": True}, "weighs a KL term that is not there"),
        (
            {"kl_corrected": True, "kl_loss_coef": 0.1, "kl_reward_coef": 0.1},
            "a KL in the reward has no corrected form",
        ),
        ({"retrace_lambda": 0.5, "rollout_is": "tis"}, "belongs to algorithm.rollout_is=retrace"),
    ],
)
def test_options_that_would_do_nothing(options: dict[str, Any], message: str) -> None:
    assert message in refusal(config(algorithm=options))


def test_everything_else_arrives_as_it_was_written() -> None:
    found = settings(
        objective="ppo_clip",
        rollout_is="retrace",
        retrace_lambda=0.9,
        log_ratio_clamp=7.0,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=3.0,
        loss_agg_mode="seq-mean-token-sum-norm",
        entropy_coeff=0.01,
        kl_loss_coef=0.02,
        kl_loss_type="k2",
        kl_corrected=True,
    )
    assert found == ObjectiveSettings(
        objective="ppo_clip",
        correction="retrace",
        correction_settings=CorrectionSettings(
            retrace_lambda=0.9, lower=0.0, upper=math.inf, log_clamp=7.0
        ),
        log_ratio_clamp=7.0,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=3.0,
        loss_agg_mode="seq-mean-token-sum-norm",
        max_response_length=48,
        entropy_coeff=0.01,
        kl_loss_coef=0.02,
        kl_loss_type="k2",
        kl_corrected=True,
    )
    assert settings(objective="gspo", bypass_mode=True).bypass_mode


def test_a_clamp_that_float32_cannot_take_is_refused() -> None:
    with pytest.raises(ValidationError, match="log_ratio_clamp"):
        config(algorithm={"log_ratio_clamp": 100})
