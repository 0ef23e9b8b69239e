"""`nested-reft bench rollout` as a person runs it: a tiny random model, one and two stages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nested_reft_mcore

REPOSITORY = Path(nested_reft_mcore.__file__).parent.parent
SHAPE = "hidden=32,layers=4,heads=4,groups=2,ffn=48,vocab=96"
SMALL = ("--shape", SHAPE, "--prompts", "4", "--prompt-tokens", "6", "--new-tokens", "12")


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nested_reft_mcore", "bench", "rollout", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )


def measured(path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    done = start(*SMALL, "--repeats", "2", "--skip", "0,25", "--output", str(path), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()), done.stdout


def test_one_process_measures_every_part_every_context_and_peers(tmp_path: Path):
    found, shown = measured(
        tmp_path / "rollout.json",
        *("--contexts", "40", "--context-sequences", "3", "--context-new-tokens", "13"),
        *("--peers", "transformers,vllm", "--vllm-python", sys.executable),
    )
    whole, decoding = found["workloads"]
    keys = ["full depth"]
    for part in ("layer", "attention", "mlp"):
        keys += [f"1 {part}", f"every {part}"]
    for workload, num_runs in ((whole, 2), (decoding, 1)):
        assert [row["key"] for row in workload["rows"]] == keys
        for row in workload["rows"]:
            assert len(row["seconds"]) == len(row["step_seconds"]) == num_runs
            assert row["kv_cache_bytes"] == row["kv_formula_bytes"]
            assert row["tokens_per_second"] > 0
            assert (row["ratio"] is None) == row["key"].startswith("every")
    # 4 layers, keys and values, 4 slots, 6 + 12 - 1 positions, 2 groups of 8, 4 bytes.
    per_layer = 2 * 4 * 17 * 2 * 8 * 4
    kv_bytes = {row["key"]: row["kv_cache_bytes"] for row in whole["rows"]}
    assert kv_bytes["full depth"] == kv_bytes["1 mlp"] == kv_bytes["every mlp"] == [4 * per_layer]
    assert kv_bytes["1 layer"] == kv_bytes["1 attention"] == [3 * per_layer]
    assert kv_bytes["every layer"] == kv_bytes["every attention"] == [0]
    assert decoding["context"] == 40
    assert decoding["workload"]["prompt_tokens"] == 27

    transformers, vllm = whole["peers"]
    assert len(transformers["seconds"]) == 2
    ours = whole["rows"][0]["tokens_per_second"]
    assert transformers["ours_over_theirs"] == pytest.approx(
        ours / transformers["tokens_per_second"]
    )
    # This interpreter has no vLLM.
    assert vllm["tokens_per_second"] is None
    assert "No module named 'vllm'" in vllm["reason"]
    assert "vllm: not measured: " in shown

    # Embedding and head are one: every number is met by a token.
    layer = 32 * (32 + 2 * 16) + 64 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    model = found["model"]
    assert model["num_layers"] == 4
    assert model["num_product_weights"] == model["num_parameters"]
    assert 4 * layer + 96 * 32 + 32 <= model["num_parameters"] <= 4 * layer + 128 * 32 + 32
    assert found["decode_step"]["rows"] == 4
    assert 0 < found["decode_step"]["fraction"] < 1
    assert found["num_threads"] == 1
    assert found["environment"]["cpu"]["count"] >= 1
    assert found["environment"]["versions"]["torch"]
    assert found["options"]["new_tokens"] == 12
    assert "takes at most about" in shown
    assert "4 x 6 + 12 16/16" in shown


@pytest.mark.distributed
def test_two_stages_share_the_layers_and_say_how_long_they_wait(tmp_path: Path):
    found, _ = measured(
        tmp_path / "rollout.json",
        *("--pipeline-parallel", "2", "--contexts", "none", "--parts", "layer"),
        *("--peers", "transformers"),
    )
    (whole,) = found["workloads"]
    per_layer = 2 * 4 * 17 * 2 * 8 * 4
    full, one, nothing = whole["rows"]
    assert full["kv_cache_bytes"] == full["kv_formula_bytes"] == [2 * per_layer] * 2
    assert sum(one["kv_cache_bytes"]) == 3 * per_layer
    assert one["kv_cache_bytes"] == one["kv_formula_bytes"]
    # One stage keeps all of its layers and sets the pace: nothing to gain.
    assert one["ceiling"] == 1.0
    assert nothing["kv_cache_bytes"] == [0, 0]
    assert len(full["waiting_shares"]) == 2
    assert all(0 < share < 1 for share in full["waiting_shares"])
    assert found["num_threads"] == 2
    assert whole["peers"][0]["reason"] is None
    # The last stage's copy of the embedding is the head, counted once.
    assert found["model"]["num_product_weights"] == found["model"]["num_parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SMALL, "--skip", "120"), "--skip 120"),
        ((*SMALL, "--parts", "head"), "--parts head"),
        ((*SMALL, "--peers", "vllm", "--vllm-python", "/nowhere/python"), "no such program"),
    ],
)
def test_mistakes_leave_with_2_and_a_message(arguments: tuple[str, ...], message: str):
    done = start(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
