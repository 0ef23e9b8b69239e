"""Whole updates: the same in every layout, on-policy where nothing is skipped, safe from NaN."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from run_workers import run_workers
from update_cases import ALGORITHMS
from update_worker import SPREAD, Measured, measure_layouts, two_process_checks

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"single": {}},
    2: {
        "tp2": {TP: 2},
        "pp2": {PP: 2},
        "dp2": {},
        "pp2-vpp2": {PP: 2, VPP: 2},
        "tp2-sp": {TP: 2, "sequence_parallel": True},
    },
    4: {
        "tp2-pp2": {TP: 2, PP: 2},
        "tp2-dp2": {TP: 2},
        "pp2-dp2": {PP: 2},
        "pp4": {PP: 4},
        "dp4": {},
    },
}
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def single() -> Measured:
    (found,) = run_workers(measure_layouts, 1, LAYOUTS[1])
    _assert_right_scores([found])
    return found["single"]


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    """What two processes found, where there is nothing to compare with."""
    return run_workers(two_process_checks, 2)


def test_updates_are_worth_comparing(single: Measured) -> None:
    for algorithm in ALGORITHMS:
        first, second = single[f"{algorithm}/replicated/4 rows"]
        assert first["actor/grad_norm"] > 0.1
        assert first["actor/pg_loss"] != second["actor/pg_loss"]
        assert first["rollout_corr/rollout_is_max"] > 2
        assert first["nested/ratio_p05"] < 0.5
    first, second = single["ppo_clip/decoupled/replicated/4 rows"]
    assert first["actor/pg_clipfrac"] == 0
    assert second["actor/pg_clipfrac"] > 0.1


def test_optimizer_and_micro_batches_change_nothing(single: Measured) -> None:
    for algorithm in ALGORITHMS:
        for other in ("replicated/2 rows", "distributed/4 rows", "distributed/40 tokens"):
            if f"{algorithm}/{other}" in single:
                expected = single[f"{algorithm}/replicated/4 rows"]
                _assert_same(single[f"{algorithm}/{other}"], expected, other)
    assert f"{SPREAD}/distributed/40 tokens" in single
    for filled, equal in zip(
        single["padding"]["40 tokens"], single["padding"]["4 rows"], strict=True
    ):
        assert filled < equal / 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_learns_the_same(single: Measured, world_size: int) -> None:
    processes = run_workers(measure_layouts, world_size, LAYOUTS[world_size])
    _assert_right_scores(processes)
    for name in LAYOUTS[world_size]:
        for found in processes:
            assert found[name] == processes[0][name], f"{name}: the ranks disagree"
            assert found[name]["plans"] == single["plans"], name
            _assert_on_policy(found[name]["on policy"])
            updates = found[name].keys() - {"plans", "on policy", "padding"}
            assert len(updates) == len(ALGORITHMS) + 1
            padding = found[name]["padding"]
            assert sum(padding["40 tokens"]) < 0.6 * sum(padding["4 rows"]), name
            for key in updates:
                _assert_same(found[name][key], single[key], f"{name}: {key}")


def test_nothing_skipped_is_on_policy(single: Measured) -> None:
    _assert_on_policy(single["on policy"])
    assert len(set(single["plans"])) > 10


def _assert_right_scores(processes: list[Measured]) -> None:
    """Log-probs, entropies and their gradients from 1, 2 or 4 shards, beside float64 autograd."""
    cases = processes[0]["scores"].keys()
    assert len(cases) == (16 if len(processes) == 1 else 18)
    for case in cases:
        errors = [found["scores"][case] for found in processes]
        for error in errors:
            for name in ("logprobs", "entropies", "hidden gradient", "weight gradient", "mass"):
                assert error[name] < 1e-5, (case, name, error[name])
            assert error["padded gradient"] == error["unwanted gradient"] == 0, case
        has_gradient = any(error["gradient is there"] for error in errors)
        assert has_gradient != case.endswith("nothing wanted"), case


def _assert_on_policy(metrics: dict[str, float]) -> None:
    """Decoding and the training forward agree on every sampled token."""
    assert metrics["rollout_corr/rollout_is_max"] <= 1 + 1e-5
    assert metrics["nested/ratio_p05"] >= 1 - 1e-5
    assert abs(metrics["rollout_corr/kl"]) < 1e-5
    assert metrics["actor/grad_norm"] > 0.01


def _assert_same(
    found: list[dict[str, float]], expected: list[dict[str, float]], what: str
) -> None:
    """Every metric of both updates, loss and gradient norm among them."""
    for update, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # Means over tokens whose terms are of order 1; a ratio of 1 has a log of rounding size.
            # Squares of products of up to eight ratios multiply the differences of the log-probs.
            rel = 1e-4 if "seq" in name else 1e-5
            assert ours[name] == pytest.approx(value, rel=rel, abs=2e-7), (what, update, name)


def test_a_plan_of_its_own_is_found_out(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        assert found["disagreement"] == "ranks [1] drew another layer-skip plan than rank 0"


def test_rollouts_after_overlapped_updates_use_the_new_weights(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        plain, overlapped = found["twins"]
        for step, ((rows, metrics), (other_rows, other_metrics)) in enumerate(
            zip(plain, overlapped, strict=True)
        ):
            assert [tokens for tokens, _ in rows] == [tokens for tokens, _ in other_rows], step
            for (_, ours), (_, theirs) in zip(rows, other_rows, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
            for name in ("actor/pg_loss", "actor/grad_norm", "rollout_corr/kl"):
                assert metrics[name] == pytest.approx(other_metrics[name], rel=1e-4), (step, name)
        # Stale weights would show: each update moves every log-prob.
        for (before, _), (after, _) in pairwise(plain):
            for (_, first), (_, second) in zip(before, after, strict=True):
                assert abs(first[0] - second[0]) > 1e-4


def test_an_update_that_is_not_finite_leaves_no_trace(pair: list[dict[str, Any]]) -> None:
    expected = {
        "first applied": True,
        "broken applied": False,
        "unchanged": True,
        "next applied": True,
        "weights of the twin": True,
        "changed by an update": True,
        "metrics of the twin": True,
    }
    for found in pair:
        for layout in ("broken on two replicas", "broken on two stages"):
            for optimizer in ("replicated", "distributed"):
                for cause in ("advantage", "gradient"):
                    for name, value in expected.items():
                        key = f"{optimizer}/{cause}/{name}"
                        assert found[layout][key] == value, (layout, key)


def test_the_reference_is_what_the_policy_began_as(pair: list[dict[str, Any]]) -> None:
    names = (
        *("reference weights", "reference log-probs", "moved", "restored", "still learns", "again"),
        *("refuses update", "refuses save", "refuses twice"),
    )
    for found in pair:
        for layout, optimizers in found["reference"].items():
            for optimizer, checks in optimizers.items():
                assert checks == dict.fromkeys(names, True), (layout, optimizer)


@pytest.mark.parametrize("layout", ["replicas", "stages", "shards"])
def test_an_update_without_some_layers(pair: list[dict[str, Any]], layout: str) -> None:
    names = (
        *("sees the nested policy", "moves the layers that ran, and no others"),
        *("leaves out a layer here", "is the full policy again", "tells"),
    )
    for found in pair:
        assert found["dropout"][layout] == dict.fromkeys(names, True)


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_padding_of_the_vocabulary_at_two_shards(pair: list[dict[str, Any]], case: str) -> None:
    shards = [found["padding"][case] for found in pair]
    # All real tokens fit into the first shard.
    assert [shard["num_padded_rows"] for shard in shards] == [87, 128]
    assert shards[0]["real_gradient"] > 0
    for shard in shards:
        assert shard["padded_gradient"] == 0
