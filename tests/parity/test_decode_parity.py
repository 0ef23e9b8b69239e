"""The nested policy decodes greedily what transformers does without the skipped layers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_cases import CASES, NUM_LAYERS, HfCase, write_model
from torch import Tensor
from transformers import PreTrainedModel

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.hf.config import read_architecture
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore import native
from nested_reft_mcore.mcore.decode import TORCH_ONLY, PolicyDecoder
from nested_reft_mcore.mcore.hf_weights import load_hf_weights
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.rollout.decode_model import DecodeCache, DecodeModel
from nested_reft_mcore.rollout.token_pass import PromptPiece, TokenPass

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    yield initialize_parallel(ParallelConfig(), ranks, seed=0)
    shutdown()


def loaded_policy(hf_dir: Path, context: ParallelContext, **model: str) -> Policy:
    config = ModelConfig(hf_path=str(hf_dir), **model)
    policy = build_policy(read_architecture(hf_dir), config, ParallelConfig(), context)
    load_hf_weights(policy, hf_dir)
    return policy


def prompts(case: HfCase) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randint(0, case.vocab_size, (length,), generator=generator).tolist()
        for length in (5, 1, 9)
    ]


def without_layers(model: PreTrainedModel, skipped: set[int]) -> PreTrainedModel:
    """The same model, these layers taken out."""
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in skipped]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def greedy_of_transformers(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Tokens, and the logits that they were taken from, each from an uncached forward."""
    tokens, logits = list(prompt), []
    for _ in range(NEW_TOKENS):
        logits.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(logits)


def greedy_of_decoder(
    decoder: PolicyDecoder, plan: LayerSkipPlan, given: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """`[prompts, new]` tokens and `[prompts, new, vocab]` logits."""
    slots = torch.tensor([4, 0, 2])
    lengths = torch.tensor([len(prompt) for prompt in given])
    cache = decoder.new_cache(plan, 5, int(lengths.max()) + NEW_TOKENS)
    pieces = tuple(
        PromptPiece(int(slot), 0, len(prompt) - 1)
        for slot, prompt in zip(slots, given, strict=True)
        if len(prompt) > 1
    )
    ids = torch.tensor([p[-1] for p in given] + [t for p in given for t in p[:-1]])
    tokens, logits = [], []
    for step in range(NEW_TOKENS):
        positions = lengths - 1 + step
        this = TokenPass(slots, positions, 1, int(positions.max()) + 1, () if step else pieces)
        found = decoder.forward(0, ids, this, cache, plan)[:, : decoder.vocab_size]
        ids = found.argmax(1)
        tokens.append(ids)
        logits.append(found)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_tokens_are_those_of_transformers_with_layers_deleted(
    case: HfCase, tmp_path: Path, context: ParallelContext
):
    model = write_model(case, tmp_path)
    policy = loaded_policy(tmp_path, context)
    plan = LayerSkipPlan(NUM_LAYERS, frozenset({(1, "layer"), (2, "layer")}))
    with torch.no_grad():
        full = [greedy_of_transformers(model, prompt) for prompt in prompts(case)]
        smaller = without_layers(model, {1, 2})
        nested = [greedy_of_transformers(smaller, prompt) for prompt in prompts(case)]
    for path in ("torch",) if native.problem() else ("torch", "native"):
        decoder = PolicyDecoder(policy, native_kernels=path == "native")
        for this_plan, expected in ((plan, nested), (LayerSkipPlan.full(NUM_LAYERS), full)):
            tokens, logits = greedy_of_decoder(decoder, this_plan, prompts(case))
            assert tokens.tolist() == [tokens for tokens, _ in expected]
            wanted = torch.stack([logits for _, logits in expected])
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


def test_which_path_is_taken(
    tmp_path: Path, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
):
    write_model(CASES[0], tmp_path)
    policy = loaded_policy(tmp_path, context)
    decoder = PolicyDecoder(policy)
    assert decoder.uses_native_kernels == (native.problem() is None)
    assert isinstance(decoder, DecodeModel)
    plan = LayerSkipPlan.full(NUM_LAYERS)
    assert isinstance(decoder.new_cache(plan, 1, 1), DecodeCache)
    monkeypatch.setenv(TORCH_ONLY, "1")
    assert not PolicyDecoder(policy).uses_native_kernels
    monkeypatch.setenv(TORCH_ONLY, "0")
    half = loaded_policy(tmp_path, context, dtype="bfloat16")
    with pytest.raises(native.Unavailable, match="float32"):
        PolicyDecoder(half, native_kernels=True)
    decoder = PolicyDecoder(half)
    assert not decoder.uses_native_kernels
    _, logits = greedy_of_decoder(decoder, plan, prompts(CASES[0]))
    assert logits.dtype == torch.float32
    _, exact = greedy_of_decoder(PolicyDecoder(policy), plan, prompts(CASES[0]))
    assert 0 < (logits - exact)[:, 0].abs().max() < 0.05 * exact.abs().max()
