"""A real language model: what the engine decodes is what the model says.

SmolLM2-135M-Instruct is taken from the directory that NESTED_REFT_SMOLLM2 names, or else fetched
once with examples/smollm2_mawps/get_model.py; without either the tests skip.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import nested_reft_mcore
from nested_reft_mcore.algorithm.counter_random import Stream, uniform
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.hf.config import read_architecture
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.decode import TORCH_ONLY, PolicyDecoder
from nested_reft_mcore.mcore.hf_weights import load_hf_weights
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.pipeline import forward_logits, forward_logprobs
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.types import Prompt, RolloutBatch, SamplingParams

pytestmark = pytest.mark.slow
GET_MODEL = Path(nested_reft_mcore.__file__).parents[1] / "examples/smollm2_mawps/get_model.py"
FOUR_LAYERS = "5,9,14,20"
SEED = 11


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest) -> Path:
    given = os.environ.get("NESTED_REFT_SMOLLM2")
    if given:
        return Path(given)
    assert request.config.cache is not None
    room = request.config.cache.mkdir("smollm2")
    command = [sys.executable, str(GET_MODEL), "--output", str(room / "model")]
    done = subprocess.run(
        [*command, "--cache", str(room)], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        pytest.skip(f"SmolLM2 could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return room / "model"


@pytest.fixture(scope="module")
def policy(directory: Path) -> Iterator[Policy]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    context = initialize_parallel(ParallelConfig(), ranks, seed=0)
    model = ModelConfig(hf_path=str(directory))
    policy = build_policy(read_architecture(directory), model, ParallelConfig(), context)
    load_hf_weights(policy, directory)
    yield policy
    shutdown()


def prompts() -> list[Prompt]:
    """Six of different lengths, of real ids."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        Prompt(tuple(torch.randint(100, 40_000, (length,), generator=generator).tolist()), "")
        for length in (3, 31, 17, 1, 9, 24)
    ]


def generate(
    policy: Policy, engine: RolloutEngine, plan: LayerSkipPlan, sampling: SamplingParams
) -> RolloutBatch:
    with policy.nested(plan):
        return engine.generate(PolicyDecoder(policy), prompts(), 2, sampling, plan)


@pytest.mark.parametrize("skipped", ["none", FOUR_LAYERS, "3.attention,8,17.mlp"])
def test_behavior_logprobs_are_the_uncached_forwards(policy: Policy, skipped: str) -> None:
    """Slots that change hands, prompts in pieces, prefixes that are copied: within 2e-4."""
    plan = LayerSkipPlan.parse(skipped, policy.architecture.num_layers)
    engine = RolloutEngine(5, max_num_batched_tokens=12)
    batch = generate(policy, engine, plan, SamplingParams(10, seed=SEED))
    assert batch.stats.prefilled_tokens == sum(len(p.token_ids) - 1 for p in prompts())
    rows = TrainingBatch.from_rollouts(batch.rollouts, torch.zeros(12), pad_token_id=0)
    with policy.nested(plan):
        uncached = forward_logprobs(policy, rows, micro_batch_size=6, temperature=1.0)
    gap = (uncached - rows.behavior_logprobs)[rows.response_mask].abs().max()
    assert gap < 2e-4


def test_greedy_tokens_are_those_of_transformers_with_the_layers_deleted(
    policy: Policy, directory: Path
) -> None:
    plan = LayerSkipPlan.parse(FOUR_LAYERS, policy.architecture.num_layers)
    batch = generate(policy, RolloutEngine(), plan, SamplingParams(12, greedy=True))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(model.model.layers) if not plan.skips_layer(index)
    )
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)
    for rollout in batch.rollouts[::2]:
        tokens = torch.tensor([rollout.prompt.token_ids])
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
        )
        assert rollout.token_ids == tuple(found[0, tokens.shape[1] :].tolist())


def test_draws_differ_between_arrangements_only_where_tokens_tie(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's kernels round differently for other numbers of rows; that may decide a tie alone."""
    monkeypatch.setenv(TORCH_ONLY, "1")
    plan = LayerSkipPlan.full(policy.architecture.num_layers)
    sampling = SamplingParams(24, seed=SEED)
    one = generate(policy, RolloutEngine(2), plan, sampling)
    other = generate(policy, RolloutEngine(12, max_num_batched_tokens=20), plan, sampling)
    num_compared = num_differing = 0
    for ours, theirs in zip(one.rollouts, other.rollouts, strict=True):
        pairs = list(zip(ours.token_ids, theirs.token_ids, strict=True))
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        num_compared += len(pairs) if place is None else place + 1
        if place is None:
            continue
        num_differing += 1
        key = (sampling.seed, sampling.step, ours.prompt_index, ours.sample_index, place)
        prefix = [*ours.prompt.token_ids, *ours.token_ids[:place]]
        check_tie(policy, prefix, pairs[place], uniform(int(Stream.SAMPLING), *key))
    assert num_compared > 200
    assert num_differing <= 2


def check_tie(policy: Policy, prefix: list[int], tokens: tuple[int, int], u: float) -> None:
    """Raise unless rounding of either token's logit makes it the one that is drawn."""
    found = []
    for padding in (0, 40):
        logits = forward_logits(policy, torch.tensor([prefix + [0] * padding]))
        assert logits is not None
        found.append(logits[0, len(prefix) - 1])
    rounding = 4 * float((found[0] - found[1]).abs().max()) + 1e-5
    for token in tokens:
        logits = found[0].clone()
        logits[token] += rounding
        drawn, _ = sample_tokens(
            logits[None],
            torch.tensor([u], dtype=torch.float64),
            SamplingParams(1),
            vocab_start=0,
            vocab_size=policy.architecture.vocab_size,
        )
        assert int(drawn) == token


def test_native_kernels_give_the_same_bits_in_every_arrangement(policy: Policy) -> None:
    if not PolicyDecoder(policy).uses_native_kernels:
        pytest.skip("there are no native kernels here")
    plan = LayerSkipPlan.parse(FOUR_LAYERS, policy.architecture.num_layers)
    sampling = SamplingParams(16, seed=SEED)
    one = generate(policy, RolloutEngine(2), plan, sampling)
    other = generate(policy, RolloutEngine(12, max_num_batched_tokens=20), plan, sampling)
    assert one.rollouts == other.rollouts
