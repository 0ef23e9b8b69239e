"""Cached decoding equals the uncached forward, and rollouts are the same for every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decode_cases import (
    GROUP_SIZE,
    LENGTHS,
    PLANS,
    PROMPT_OF,
    SLOT_CASES,
    Decoded,
    decode_layout,
)
from run_workers import run_workers

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.mcore import native

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def single() -> Decoded:
    (decoded,) = run_workers(decode_layout, 1, {})
    return decoded


def test_cached_logits_equal_the_uncached_forward(single: Decoded) -> None:
    assert len(single.uncached_logits) == len(PLANS) + 1
    assert_logits_equal(single, single)
    full = single.uncached_logits["tied/none"]
    for text in PLANS[1:]:
        assert np.abs(full - single.uncached_logits[f"tied/{text}"]).max() > 0.1, text


def test_behavior_logprobs_equal_the_uncached_forward(single: Decoded) -> None:
    assert max(single.uncached_gap.values()) < 1e-5


def test_cases_reach_both_ends_of_a_completion(single: Decoded) -> None:
    completions = single.rollouts["tied/none/sampled/64"]
    assert {reason for _, _, reason in completions} == {"stop", "length"}
    assert len(completions) == len(LENGTHS) * GROUP_SIZE
    for tokens, logprobs, reason in completions:
        assert len(tokens) == len(logprobs)
        assert (tokens[-1] in (7, 11)) == (reason == "stop")
        assert not {7, 11} & set(tokens[:-1])
        assert reason == "stop" or len(tokens) == 9


def test_slot_count_changes_nothing(single: Decoded) -> None:
    for name in SLOT_CASES:
        whole = single.rollouts[f"{name}/sampled/64"]
        for slots in (5, 2):
            assert_same(single.rollouts[f"{name}/sampled/{slots}"], whole, name)


def test_samples_of_a_prompt_differ_unless_greedy(single: Decoded) -> None:
    sampled = single.rollouts["tied/none/sampled/64"]
    greedy = single.rollouts["tied/none/greedy/64"]
    for start in range(0, len(sampled), GROUP_SIZE):
        assert len({tokens for tokens, _, _ in sampled[start : start + GROUP_SIZE]}) > 1
        assert len({tokens for tokens, _, _ in greedy[start : start + GROUP_SIZE]}) == 1


def test_only_parts_of_the_plan_run(single: Decoded) -> None:
    for key, (attention, mlp) in single.executions.items():
        plan = LayerSkipPlan.parse(key.split("/")[1], len(attention))
        assert [n == 0 for n in attention] == [plan.skips_attention(i) for i in range(len(mlp))]
        assert [n == 0 for n in mlp] == [plan.skips_mlp(i) for i in range(len(mlp))]
    # Nothing stops a greedy completion, so one group takes a prefill and eight tokens.
    assert set(single.executions["tied/none/greedy/64"][0]) == {9}


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(2, {TP: 2}, id="tp2"),
        pytest.param(2, {PP: 2}, id="pp2"),
        pytest.param(2, {PP: 2, VPP: 2}, id="pp2-vpp2"),
        pytest.param(4, {TP: 2, PP: 2}, id="tp2-pp2"),
        pytest.param(4, {PP: 4, VPP: 2}, id="pp4-vpp2"),
    ],
)
def test_every_layout_generates_the_same(
    single: Decoded, world_size: int, options: dict[str, Any]
) -> None:
    processes = run_workers(decode_layout, world_size, options)
    for decoded in processes:
        assert decoded.rollouts.keys() == single.rollouts.keys()
        for key, rollouts in decoded.rollouts.items():
            assert_same(rollouts, single.rollouts[key], key)
        assert decoded.rollouts == processes[0].rollouts, "ranks disagree about the results"
        assert decoded.executions == processes[0].executions
        assert max(decoded.uncached_gap.values()) < 1e-5
        if decoded.cached_logits:
            assert_logits_equal(decoded, single)
    assert any(decoded.cached_logits for decoded in processes)


def assert_logits_equal(decoded: Decoded, single: Decoded) -> None:
    """Every path's logits of every place equal the uncached forward's."""
    paths = ("torch",) if native.problem() else ("torch", "native")
    wanted = {f"{name}/{path}" for name in single.uncached_logits for path in paths}
    assert decoded.cached_logits.keys() == wanted
    for key, cached in decoded.cached_logits.items():
        uncached = single.uncached_logits[key.rpartition("/")[0]]
        for cached_one, prompt in zip(cached, PROMPT_OF, strict=True):
            assert np.abs(cached_one - uncached[prompt]).max() < 1e-5, key


def assert_same(found: list[Any], expected: list[Any], name: str) -> None:
    """Equal tokens and reasons; log-probs within rounding."""
    assert [(tokens, reason) for tokens, _, reason in found] == [
        (tokens, reason) for tokens, _, reason in expected
    ], name
    for (_, ours, _), (_, theirs, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)
