"""Objectives against float64 values of an independent plain-Python implementation."""

import json
from pathlib import Path

import pytest
import torch

from nested_reft_mcore.algorithm.diagnostics import finalize_metrics, ratio_p05
from nested_reft_mcore.algorithm.importance import CorrectionSettings
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss

DOCUMENT = json.loads(Path(__file__).with_name("objective_goldens.json").read_text())


def golden_inputs():
    tensors = {
        name: torch.tensor(value, dtype=torch.bool if name == "response_mask" else torch.float64)
        for name, value in DOCUMENT["inputs"].items()
    }
    tensors["target_logprobs"].requires_grad_()
    return LossInputs(**tensors)


def settings_of(case):
    bounds = {"retrace_lambda", "lower", "upper"}
    correction = CorrectionSettings(**{k: v for k, v in case.items() if k in bounds})
    rest = {k: v for k, v in case.items() if k not in bounds}
    return ObjectiveSettings(correction_settings=correction, **rest)


@pytest.mark.parametrize("case", DOCUMENT["cases"], ids=lambda case: case["name"])
def test_objective_matches_golden(case):
    inputs, expected = golden_inputs(), case["expected"]
    output = policy_loss(inputs, settings_of(case["settings"]))
    output.loss_sum.backward()
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(
        output.loss_sum.detach(), torch.tensor(expected["loss_sum"], dtype=torch.float64), **close
    )
    gradient = torch.tensor(expected["gradient"], dtype=torch.float64)
    torch.testing.assert_close(inputs.target_logprobs.grad, gradient, **close)
    assert int(output.denominator) == expected["num_tokens"]
    metrics = finalize_metrics(output.metrics, output.maxima)
    metrics = {name: metrics[name] for name in expected["metrics"]}
    assert metrics == pytest.approx(expected["metrics"], rel=1e-12, abs=1e-13)
    assert ratio_p05(output.log_ratios) == pytest.approx(expected["ratio_p05"], rel=1e-12)


def test_goldens_reach_every_branch():
    """Clipping on and off, and clamped log-ratios, occur in the golden cases."""
    cases = {case["name"]: case["expected"] for case in DOCUMENT["cases"]}
    for name in ("ppo_decoupled_base", "ppo_decoupled_retrace", "ppo_bypass"):
        assert 0 < cases[name]["metrics"]["actor/pg_clipfrac"] < 1
    assert cases["reinforce_base"]["loss_sum"] != cases["reinforce_base_clamped"]["loss_sum"]
    assert any(a < 0 for a in DOCUMENT["inputs"]["advantages"])
    assert any(a > 0 for a in DOCUMENT["inputs"]["advantages"])


def test_provenance_is_recorded():
    assert {"script", "method", "dtype", "python", "torch"} <= set(DOCUMENT["provenance"])
