"""One process that decodes: rollouts and logits of the tiny model, to compare between layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from model_cases import VOCAB_SIZE, randomize_norms_and_biases, shapes
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.decode import PolicyDecoder, parameters_of
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.pipeline import forward_logprobs
from nested_reft_mcore.mcore.weights import initialize_weights
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.generation import GenerationInterrupted
from nested_reft_mcore.rollout.types import Prompt, RolloutBatch, SamplingParams

TEMPERATURE = 0.8
PLANS = ("none", "1.attention,3.mlp,4,6.attention", "2.attention,5.attention", "4,5,6,7")
"""Nothing; a layer and parts; attention alone; the whole second stage of two."""
SLOT_CASES = ("tied/none", f"tied/{PLANS[1]}")
"""Where few slots are tried too."""
LENGTHS = (4, 2, 7, 3)
"""Tokens of each prompt."""
GROUP_SIZE = 3


@dataclass(frozen=True)
class Decoded:
    """What one process found. Keys name shape, plan and sampling."""

    rollouts: dict[str, list[tuple[tuple[int, ...], tuple[float, ...], str]]]
    """Token ids, behavior log-probs and finish reason of each completion."""
    uncached_gap: dict[str, float]
    """Largest distance of a behavior log-prob from the uncached forward's."""
    cached_logits: dict[str, np.ndarray]
    """`[sequences, steps, vocab]`, teacher-forced; on the last stage alone."""
    uncached_logits: dict[str, np.ndarray]
    """The same from GPTModel's forward; in a single process alone."""
    executions: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Passes of each layer's attention and MLP."""


def prompts() -> list[Prompt]:
    """Four prompts of different lengths."""
    generator = torch.Generator().manual_seed(11)
    return [
        Prompt(tuple(torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()), "")
        for length in LENGTHS
    ]


def samplings() -> dict[str, SamplingParams]:
    """Plain sampling with stop tokens, greedy, and truncated."""
    common: dict[str, Any] = {"max_new_tokens": 9, "temperature": TEMPERATURE, "seed": 2, "step": 7}
    return {
        "sampled": SamplingParams(**common, stop_token_ids=(7, 11)),
        "greedy": SamplingParams(**common, greedy=True),
        "truncated": SamplingParams(**common, top_k=9, top_p=0.7),
    }


def decode_layout(ranks: RankInfo, options: dict[str, Any]) -> Decoded:
    """Run every case in this layout."""
    parallel = ParallelConfig(**options)
    context = initialize_parallel(parallel, ranks, seed=0)
    found = Decoded({}, {}, {}, {}, {})
    for shape_name, shape in shapes().items():
        policy = build_policy(shape, ModelConfig(architecture=shape), parallel, context)
        initialize_weights(policy, seed=3)
        randomize_norms_and_biases(policy)
        decoder = PolicyDecoder(policy)
        check_storage_is_shared(policy, decoder)
        for text in PLANS if shape_name == "tied" else PLANS[:1]:
            plan = LayerSkipPlan.parse(text, shape.num_layers)
            with policy.nested(plan):
                run_plan(policy, decoder, plan, f"{shape_name}/{text}", found)
            check_cache_follows_plan(policy, decoder, plan)
    shutdown()
    return found


def run_plan(
    policy: Policy, decoder: PolicyDecoder, plan: LayerSkipPlan, name: str, found: Decoded
) -> None:
    """Generate in every way, compare with the uncached forward, decode given sequences."""
    for kind, sampling in samplings().items():
        if kind != "sampled" and plan.num_skipped:
            continue
        if kind == "sampled":
            # What an abandoned generation leaves under way would show in all that follow.
            abandon(decoder, sampling, plan)
        for slots in (64, 5, 2) if kind == "sampled" and name in SLOT_CASES else (64,):
            batch = RolloutEngine(slots).generate(
                decoder, prompts(), GROUP_SIZE, sampling, plan, first_prompt_index=10
            )
            key = f"{name}/{kind}/{slots}"
            found.rollouts[key] = [
                (r.token_ids, r.behavior_logprobs, r.finish_reason) for r in batch.rollouts
            ]
            found.executions[key] = (batch.stats.attention_executions, batch.stats.mlp_executions)
            if key.endswith(("sampled/64", "greedy/64")):
                found.uncached_gap[key] = uncached_gap(policy, batch)
    sequences = given_sequences()
    logits = cached_logits(decoder, sequences)
    if logits is not None:
        found.cached_logits[name] = logits.numpy()
    if policy.context.world_size == 1:
        found.uncached_logits[name] = uncached_logits(policy, sequences).numpy()


def abandon(decoder: PolicyDecoder, sampling: SamplingParams, plan: LayerSkipPlan) -> None:
    """Give up a generation of several slot groups in its eighth round."""
    answers = iter([False, True])
    with pytest.raises(GenerationInterrupted):
        RolloutEngine(5).generate(
            decoder,
            prompts(),
            GROUP_SIZE,
            sampling,
            plan,
            interrupted=lambda: next(answers),
        )
    assert next(answers, None) is None


def uncached_gap(policy: Policy, batch: RolloutBatch) -> float:
    """Largest |behavior - uncached| over the response tokens."""
    rows = TrainingBatch.from_rollouts(
        batch.rollouts, torch.zeros(len(batch.rollouts)), pad_token_id=0
    )
    uncached = forward_logprobs(policy, rows, micro_batch_size=6, temperature=TEMPERATURE)
    return float((uncached - rows.behavior_logprobs)[rows.response_mask].abs().max())


def given_sequences(steps: int = 5) -> list[list[int]]:
    """Each prompt and `steps` tokens after it, given and not sampled."""
    generator = torch.Generator().manual_seed(12)
    more = torch.randint(0, VOCAB_SIZE, (len(LENGTHS), steps), generator=generator).tolist()
    return [[*prompt.token_ids, *tail] for prompt, tail in zip(prompts(), more, strict=True)]


def cached_logits(decoder: PolicyDecoder, sequences: list[list[int]]) -> Tensor | None:
    """Prefill the prompts, then feed the rest token by token; `[sequences, steps + 1, vocab]`."""
    lengths = torch.tensor(LENGTHS)
    steps = len(sequences[0]) - LENGTHS[0]
    cache = decoder.new_cache(torch.arange(len(LENGTHS)), max(LENGTHS) + steps)
    rows = torch.arange(len(LENGTHS))
    padded = torch.zeros(len(LENGTHS), max(LENGTHS) + steps, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence)
    collected = []
    for step in range(steps + 1):
        positions = lengths + step - 1
        tokens = padded[rows, positions][:, None] if step else padded[:, : max(LENGTHS)]
        for chunk in range(decoder.num_chunks):
            inputs = tokens
            if not decoder.link.is_first or chunk > 0:
                shape = (*tokens.shape, decoder.hidden_size)
                inputs = decoder.link.receive_previous(shape, decoder.dtype, decoder.device)
            if step:
                span = max(LENGTHS) + step
                output = decoder.decode(chunk, inputs, positions, span, True, cache)
            else:
                output = decoder.prefill(chunk, inputs, lengths, cache)
            if decoder.link.is_last and chunk == decoder.num_chunks - 1:
                collected.append(whole_vocabulary(decoder, output))
            else:
                decoder.link.send_next(output).wait()
    return torch.stack(collected, dim=1) if collected else None


def whole_vocabulary(decoder: PolicyDecoder, shard: Tensor) -> Tensor:
    """The real columns of the logits from every tensor-parallel rank's shard."""
    if decoder.tensor_group is None:
        return shard[:, : decoder.vocab_size]
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(decoder.tensor_group))]
    dist.all_gather(shards, shard.contiguous(), group=decoder.tensor_group)
    return torch.cat(shards, dim=1)[:, : decoder.vocab_size]


def uncached_logits(policy: Policy, sequences: list[list[int]]) -> Tensor:
    """GPTModel's own forward over whole sequences, at the places that decoding visits."""
    (model,) = policy.chunks
    collected = []
    with torch.no_grad():
        for length, sequence in zip(LENGTHS, sequences, strict=True):
            tokens = torch.tensor([sequence])
            places = torch.arange(len(sequence))[None]
            collected.append(
                model(tokens, places, None)[0, length - 1 :, : policy.architecture.vocab_size]
            )
    return torch.stack(collected)


def check_storage_is_shared(policy: Policy, decoder: PolicyDecoder) -> None:
    """Raise unless the decoder reads the very parameters of the policy."""
    own = {p.data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
    for chunk in decoder.weights:
        for layer in chunk:
            for weight in parameters_of(layer):
                assert weight.data_ptr() in own, f"a weight of layer {layer.index} was copied"


def check_cache_follows_plan(policy: Policy, decoder: PolicyDecoder, plan: LayerSkipPlan) -> None:
    """Raise unless only running attention has a cache, which another plan may not use."""
    here = {layer.index for chunk in decoder.weights for layer in chunk}
    source = torch.zeros(1, dtype=torch.int64)
    with policy.nested(plan):
        cache = decoder.new_cache(source, 3)
    assert set(cache.keys) == {index for index in here if not plan.skips_attention(index)}
    assert set(cache.values) == set(cache.keys)
    if plan.num_skipped == 0:
        return
    with pytest.raises(RuntimeError, match="the cache was filled under plan"):
        decoder.decode(0, torch.zeros(1, 1, dtype=torch.int64), source, 1, False, cache)
