"""From single runs to rows and tables."""

import json
from dataclasses import replace

import pytest

from nested_reft_mcore.bench.cases import FULL, make_cases
from nested_reft_mcore.bench.hardware import Machine, StepBound
from nested_reft_mcore.bench.report import describe_workload, write_results
from nested_reft_mcore.bench.results import (
    ModelFacts,
    Results,
    WorkloadResult,
    make_decode_step,
    make_peer_row,
    make_rows,
)
from nested_reft_mcore.bench.workload import Timing, Workload
from nested_reft_mcore.config.bench import BenchRolloutOptions

WORKLOAD = Workload(num_prompts=4, num_samples=1, prompt_tokens=8, new_tokens=25)
STAGES = (0, 0, 1, 1)
CASES = make_cases(BenchRolloutOptions(skip="50", parts="layer"), 4, STAGES)
KV = [(1000, 1000), (500, 500), (0, 0)]


def timing(seconds: float, step_seconds: float | None = 0.1) -> Timing:
    return Timing(seconds, step_seconds, (0.1 * seconds, 0.0), (1000, 1000), 4, 28)


def runs(full: list[float], half: list[float], nothing: list[float]) -> dict[str, list[Timing]]:
    times = zip(CASES, (full, half, nothing), strict=True)
    return {case.key: [timing(s, s / 50) for s in seconds] for case, seconds in times}


def test_rows_are_medians_against_the_ceiling():
    found = runs([10.0, 2.0, 1.0], [1.0, 1.5, 9.0], [1.0, 1.0, 1.0])
    full, half, nothing = make_rows(CASES, found, WORKLOAD, STAGES, KV, decode_only=False)
    assert (full.tokens_per_second, full.speedup, full.ceiling) == (50.0, 1.0, 1.0)
    assert full.spread == (10.0, 100.0)
    assert full.seconds == (10.0, 2.0, 1.0)
    assert full.waiting_shares == pytest.approx((0.2, 0.0))
    assert half.speedup == pytest.approx(2.0 / 1.5)
    # One of two layers on each stage: half of the one second that layers take.
    assert half.ceiling == pytest.approx(2.0 / 1.5)
    assert half.ratio == pytest.approx(1.0)
    assert half.kv_formula_bytes == (500, 500)
    assert nothing.speedup == 2.0
    assert nothing.ceiling is None
    assert nothing.ratio is None


def test_decoding_alone_is_compared_by_its_steps():
    found = runs([10.0], [7.0], [2.5])
    full, *_ = make_rows(CASES, found, WORKLOAD, STAGES, KV, decode_only=True)
    # A step of 0.2 s gives each of 4 sequences a token.
    assert full.tokens_per_second == pytest.approx(20.0)


def test_decode_step_against_its_bound():
    rows = make_rows(CASES, runs([10.0], [7.0], [2.5]), WORKLOAD, STAGES, KV, decode_only=False)
    step = make_decode_step(rows, WORKLOAD, StepBound(0.05, 0.08))
    assert step is not None
    assert (step.rows, step.fraction) == (4, pytest.approx(0.4))
    unseen = [replace(rows[0], step_seconds=()), *rows[1:]]
    assert make_decode_step(unseen, WORKLOAD, StepBound(0.05, 0.08)) is None


def test_peers_say_how_fast_or_why_not():
    measured = make_peer_row("vllm", "1.0", [2.0, 4.0, 3.0], None, WORKLOAD, 50.0)
    assert measured.tokens_per_second == pytest.approx(100 / 3)
    assert measured.ours_over_theirs == pytest.approx(1.5)
    gone = make_peer_row("vllm", "1.0", [2.0, None, None], "left with 1: killed", WORKLOAD, 50.0)
    assert gone.ours_over_theirs is None
    absent = make_peer_row("transformers", None, [], "no such model", WORKLOAD, 50.0)
    rows = make_rows(CASES, runs([10.0], [7.0], [2.5]), WORKLOAD, STAGES, KV, decode_only=False)
    result = WorkloadResult(WORKLOAD.describe(), WORKLOAD, None, rows, (measured, gone, absent))
    lines = describe_workload(result)
    assert lines[0].startswith("4 x 8 + 25")
    assert len({len(line.split("  ")[0]) for line in lines[1:5]}) >= 1
    assert lines[3].startswith("2 layer (50%)")
    assert lines[-3] == "vllm 1.0: 33.3 tokens/s; full depth here is 1.50x as fast"
    assert lines[-2] == "vllm 1.0: not measured: left with 1: killed"
    assert lines[-1] == "transformers: not measured: no such model"


def test_json_holds_every_run(tmp_path):
    rows = make_rows(
        CASES, runs([3.0, 2.0], [1.0, 1.0], [1.0, 1.0]), WORKLOAD, STAGES, KV, decode_only=False
    )
    results = Results(
        what="bench rollout",
        options={},
        environment={},
        num_threads=2,
        native_kernels=True,
        model=ModelFacts(4, 10, 8, 32),
        machine=Machine(1.0, 1.0),
        decode_step=None,
        workloads=(WorkloadResult("w", WORKLOAD, None, rows, ()),),
    )
    write_results(results, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    full = found["workloads"][0]["rows"][0]
    assert (full["key"], full["seconds"]) == (FULL, [3.0, 2.0])
