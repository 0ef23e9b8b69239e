"""The probe's KL against transformers, and for every layout of the model's processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import NUM_LAYERS
from inference_cases import (
    PROMPT_LINES,
    completion_logits,
    reference_model,
    write_lines,
    write_model_with_tokenizer,
)
from megatron.core import parallel_state
from run_workers import run_workers

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.analysis.plan_meter import PlanMeter
from nested_reft_mcore.analysis.probe import probe_policy
from nested_reft_mcore.config.probe import ProbeOptions
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.rollout.types import Prompt, Rollout
from nested_reft_mcore.training.policy_setup import load_policy

TEMPERATURE = 0.7
SKIPPED = ("none", "1", "2.attention", "0.mlp,3", "0,1,2,3")
ANSWERS = (
    ([13, 4, 5], [9, 1, 30]),
    ([40], [2, 2, 2, 2, 2, 7]),
    ([11, 12, 13, 14, 15, 16], [5]),
    ([6, 6], [0, 39, 17, 4]),
    ([30, 0, 30], [8, 8]),
)


def measure(parallel: ParallelConfig, hf: str, ranks: RankInfo) -> list[dict[str, float]]:
    """The divergence of each of SKIPPED on one process of a layout; replicas share the answers."""
    context = initialize_parallel(parallel, ranks, seed=0)
    policy = load_policy(ModelConfig(hf_path=hf), parallel, context)
    rollouts = [
        Rollout(Prompt(tuple(prompt), ""), 0, 0, tuple(answer), (0.0,) * len(answer), "length")
        for prompt, answer in ANSWERS
    ]
    if context.data.size == 2:
        rollouts = rollouts[:2] if context.data.rank == 0 else rollouts[2:]
    meter = PlanMeter(policy, rollouts, batch_size=2, temperature=TEMPERATURE)
    plans = [LayerSkipPlan.parse(text, NUM_LAYERS) for text in SKIPPED]
    found = [divergence.model_dump() for divergence in meter.measure(plans)]
    assert meter.num_new(plans) == 0
    assert policy.plan == LayerSkipPlan.full(NUM_LAYERS)
    return found


def options(hf: str, prompts: Path, output: Path) -> ProbeOptions:
    return ProbeOptions(
        hf=hf,
        prompts=str(prompts),
        output=str(output),
        limit=3,
        num_samples=1,
        max_new_tokens=6,
        kl_budget=0.4,
        context_length=16,
        decode_sequences=2,
        repeats=1,
        random_layers="2",
        draws=1,
        calibration=3,
        held_out=1,
        batch_size=2,
    )


def work(ranks: RankInfo, hf: str, prompts: Path, directory: Path) -> list[Any]:
    """Several layouts in one start of two processes."""
    found: list[Any] = []
    for sizes in ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}):
        found.append(measure(ParallelConfig(**sizes), hf, ranks))
        parallel_state.destroy_model_parallel()
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    context = initialize_parallel(parallel, ranks, seed=0)
    given = options(hf, prompts, directory / "staged.json")
    probe_policy(given.model_copy(update={"parallel": parallel}), context)
    parallel_state.destroy_model_parallel()
    shutdown()
    return found


def naive(directory: Path) -> list[tuple[float, float, float]]:
    """(KL, its standard error, overlap) of each of SKIPPED from transformers' whole logits."""
    full = reference_model(directory)
    expected = []
    for skipped in SKIPPED:
        nested = reference_model(directory, skipped)
        sums = []
        for prompt, answer in ANSWERS:
            p, q = (
                (completion_logits(model, prompt, answer).double() / TEMPERATURE).softmax(-1)
                for model in (nested, full)
            )
            kl = (p * (p.log() - q.log())).sum()
            sums.append((float(kl), float(torch.minimum(p, q).sum()), len(answer)))
        kls, overlaps, counts = (
            torch.tensor(column).double() for column in zip(*sums, strict=True)
        )
        mean = kls.sum() / counts.sum()
        # The error of a ratio of two sums over independent answers.
        residuals = kls - mean * counts
        error = (residuals.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / counts.sum()
        expected.append((float(mean), float(error), float(overlaps.sum() / counts.sum())))
    return expected


@pytest.mark.distributed
def test_the_exact_divergence_on_every_layout(tmp_path: Path):
    model = tmp_path / "model"
    write_model_with_tokenizer(model)
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPT_LINES)
    expected = naive(model)
    assert expected[0] == pytest.approx((0.0, 0.0, 1.0))
    assert all(kl > 0.01 for kl, _, _ in expected[1:])

    def check(found: list[dict[str, float]]) -> None:
        for divergence, (kl, error, overlap) in zip(found, expected, strict=True):
            assert divergence["kl"] == pytest.approx(kl, abs=2e-6, rel=1e-5)
            assert divergence["kl_error"] == pytest.approx(error, abs=2e-6, rel=1e-4)
            assert divergence["overlap"] == pytest.approx(overlap, abs=2e-6)

    alone = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    check(measure(ParallelConfig(), str(model), alone))
    parallel_state.destroy_model_parallel()
    context = initialize_parallel(ParallelConfig(), alone, seed=0)
    probe_policy(options(str(model), prompts, tmp_path / "alone.json"), context)
    shutdown()
    # Two tensor-parallel ranks, two stages, two replicas.
    for process in run_workers(work, 2, str(model), prompts, tmp_path):
        for layout in process:
            check(layout)
    one, staged = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("alone", "staged"))
    for part, other in zip(one["parts"], staged["parts"], strict=True):
        assert (part["layer"], part["part"]) == (other["layer"], other["part"])
        assert part["kl"] == pytest.approx(other["kl"], abs=2e-6, rel=1e-4)
    assert one["answers"] == staged["answers"]
    assert (tmp_path / "staged.png").read_bytes().startswith(b"\x89PNG")
