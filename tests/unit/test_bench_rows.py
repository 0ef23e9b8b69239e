"""The rows of benchmarks/bench_rollout.py: verdicts, missing peers, plans that are compared."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nested_reft_mcore.algorithm.layer_skip import predicted_speedup

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_rollout
import rollout_rows
from rollout_rows import Line, Settings, pipeline_plans

STAGES = [0] * 15 + [1] * 15
BARE = Settings(hf=None, vllm_python=None, threads=2, repeats=1)


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        (Line("w", "a", None, 2.0), "skipped"),
        (Line("w", "a", 1.9, 2.0, 2.5), "missed"),
        (Line("w", "a", 2.1, 2.0, 2.5), "met"),
        (Line("w", "a", 2.6, 2.0, 2.5), "aim met"),
        (Line("w", "a", 0.3, aim=0.4), "below aim"),
        (Line("w", "a", 0.3), "reported"),
        (Line("w", "a", 0.1, at_most=0.15), "met"),
        (Line("w", "a", 0.2, at_most=0.15), "missed"),
    ],
)
def test_verdicts(line: Line, verdict: str):
    assert line.verdict == verdict


@pytest.mark.parametrize("name", ["smollm2-16", "smollm2-64", "step", "skip"])
def test_rows_about_smollm2_are_skipped_without_it(name: str, capsys: pytest.CaptureFixture[str]):
    lines = rollout_rows.ROWS[name](BARE)
    assert [line.verdict for line in lines] == ["skipped"]
    bench_rollout.show(lines)
    assert "give SmolLM2-135M by --hf" in capsys.readouterr().out


def test_a_peer_that_was_not_measured_is_skipped_with_its_reason():
    found = {
        "workloads": [
            {
                "rows": [{"tokens_per_second": 100.0}],
                "peers": [
                    {
                        "name": "transformers",
                        "version": "5",
                        "tokens_per_second": 40.0,
                        "ours_over_theirs": 2.5,
                        "reason": None,
                    },
                    {"name": "vllm", "reason": "left with 1: no AVX"},
                ],
            }
        ]
    }
    wanted = {"transformers": (1.8, None), "vllm": (1.5, None)}
    measured, missing = rollout_rows._against_peers(found, "w", wanted)
    assert (measured.measured, measured.verdict) == (2.5, "met")
    assert missing.verdict == "skipped"
    assert missing.note == "not measured: left with 1: no AVX"


def test_balanced_plan_counts_the_head_and_uniform_ones_are_slower():
    model = cast(Any, SimpleNamespace(num_layers=30, stage_of_layer=STAGES))
    balanced, *uniform = pipeline_plans(model, 8.0)
    skipped = [sum(STAGES[layer] == stage for layer, _ in balanced.skipped) for stage in (0, 1)]
    # 15 - 1 layers against 15 - 9 and the head: as even as ten skips can make it.
    assert skipped == [1, 9]
    assert len(uniform) == 3
    best = predicted_speedup(balanced, STAGES, (0.0, 8.0))
    for plan in uniform:
        assert plan.num_skipped == 10
        assert best / predicted_speedup(plan, STAGES, (0.0, 8.0)) >= 1.1
