"""Objectives against float64 values of an independent plain-Python implementation."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from nested_reft_mcore.algorithm.diagnostics import finalize_metrics, ratio_p05
from nested_reft_mcore.algorithm.importance import CORRECTIONS, CorrectionSettings
from nested_reft_mcore.algorithm.objectives import LossInputs, ObjectiveSettings, policy_loss
from nested_reft_mcore.algorithm.rejection import REJECTIONS, RejectionRule

DOCUMENT = json.loads(Path(__file__).with_name("objective_goldens.json").read_text())
CASES = {(case["name"], case["inputs"]): case for case in DOCUMENT["cases"]}
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def golden_inputs(kind):
    tensors = {
        name: torch.tensor(value, dtype=torch.bool if name == "response_mask" else torch.float64)
        for name, value in DOCUMENT["inputs"][kind].items()
    }
    tensors["target_logprobs"].requires_grad_()
    tensors["entropy"].requires_grad_()
    return LossInputs(**tensors)


def golden_settings(values):
    bounds = CorrectionSettings(**values.get("correction_settings", {}))
    rules = tuple(RejectionRule(**rule) for rule in values.get("rejections", []))
    return ObjectiveSettings(**{**values, "correction_settings": bounds, "rejections": rules})


@pytest.mark.parametrize(
    "case", CASES.values(), ids=lambda case: f"{case['name']}-{case['inputs']}"
)
def test_objective_matches_golden(case):
    inputs, expected = golden_inputs(case["inputs"]), case["expected"]
    output = policy_loss(inputs, golden_settings(case["settings"]))
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(expected["loss_sum"], rel=1e-12, abs=1e-13)
    gradient = torch.tensor(expected["gradient"], dtype=torch.float64)
    torch.testing.assert_close(inputs.target_logprobs.grad, gradient, **CLOSE)
    gradient = torch.tensor(expected["entropy_gradient"], dtype=torch.float64)
    got = inputs.entropy.grad
    torch.testing.assert_close(
        torch.zeros_like(gradient) if got is None else got, gradient, **CLOSE
    )
    assert int(output.denominator) == expected["denominator"]
    metrics = finalize_metrics(output.metrics, output.maxima)
    assert metrics == pytest.approx(expected["metrics"], rel=1e-12, abs=1e-13)
    assert ratio_p05(output.log_ratios) == pytest.approx(expected["ratio_p05"], rel=1e-12)


def expected_of(name, kind="clean"):
    return CASES[name, kind]["expected"]


def test_goldens_reach_every_branch():
    """Clipping, dual clip, truncation, clamps and rejections each do something, and not all."""
    names = {name for name, _ in CASES}
    clipping = [n for n in names if n.startswith(("ppo", "cispo", "gspo"))]
    held = [expected_of(n)["metrics"]["actor/pg_clipfrac"] for n in clipping]
    assert sum(0 < share < 1 for share in held) > len(held) // 2
    for name in ("ppo_clip_dual_clip", "gspo_dual_clip"):
        assert 0 < expected_of(name)["metrics"]["actor/pg_clipfrac_lower"] < 1
    for name in ("trajectory", "prefix", "geometric"):
        plain, truncated = (expected_of(f"reinforce_{name}{x}") for x in ("", "_truncated"))
        assert plain["loss_sum"] != truncated["loss_sum"]
    plain, clamped = (expected_of(f"reinforce_trajectory{x}") for x in ("", "_clamped"))
    assert plain["loss_sum"] != clamped["loss_sum"]
    for name in names:
        share = expected_of(name)["metrics"]["rollout_corr/rollout_rs_masked_fraction"]
        if name == "reject_everything":
            assert share == 1.0
        elif name.startswith("reject") or "icepop" in name:
            assert 0 < share < 1, name
        else:
            assert share == 0, name
    assert {math.copysign(1, a) for a in DOCUMENT["inputs"]["clean"]["advantages"]} == {1.0, -1.0}


def test_goldens_cover_every_name():
    settings = [case["settings"] for case in CASES.values()]
    pairs = {(s.get("objective", "reinforce"), s.get("correction")) for s in settings}
    objectives = ("reinforce", "ppo_clip", "cispo", "gspo")
    assert set(itertools.product(objectives, CORRECTIONS)) <= pairs
    assert {r["name"] for s in settings for r in s.get("rejections", [])} == set(REJECTIONS)
    losses = {name: expected_of(name)["loss_sum"] for name, _ in CASES}
    assert losses["kl_k1_plain"] != losses["kl_k2_plain"] != losses["kl_k3_plain"]
    for kind in ("k1", "k2", "k3"):
        assert losses[f"kl_{kind}_plain"] != losses[f"kl_{kind}_corrected"]


def test_faulty_log_probs_cost_their_own_tokens_only():
    """Of behavior, old and reference: each is dropped and counted where it is looked at."""
    counts = {
        name: expected_of(name, "faulty")["metrics"]["nested/num_non_finite_ratios"]
        for name in ("reinforce_base", "ppo_clip_base", "kl_k3_plain")
    }
    assert counts == {"reinforce_base": 1, "ppo_clip_base": 2, "kl_k3_plain": 3}


def test_provenance_is_recorded():
    assert {"script", "method", "dtype", "python", "torch"} <= set(DOCUMENT["provenance"])
