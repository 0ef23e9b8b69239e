"""One process that decodes: rollouts and logits of the tiny model, to compare between layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from model_cases import VOCAB_SIZE, randomize_norms_and_biases, shapes
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore import native
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.layer_weights import parameters_of
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.pipeline import forward_logprobs
from nested_reft_mcore.mcore.weights import initialize_weights
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.generation import GenerationInterrupted
from nested_reft_mcore.rollout.token_pass import PrefixCopy, PromptPiece, TokenPass
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
    """`[sequences, steps + 1, vocab]`, teacher-forced; on the last stage alone. Keys end with the
    way to compute: native or torch."""
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
        for text in PLANS if shape_name == "tied" else PLANS[:1]:
            plan = LayerSkipPlan.parse(text, shape.num_layers)
            with policy.nested(plan):
                run_passes(policy, plan, f"{shape_name}/{text}", found)
                run_plan(policy, decoder, plan, f"{shape_name}/{text}", found)
            check_cache_follows_plan(decoder, plan)
        check_storage_is_shared(policy, decoder)
        check_least_is_agreed_on(decoder)
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
            batch = RolloutEngine(max_slots=slots).generate(
                decoder, prompts(), GROUP_SIZE, sampling, plan, first_prompt_index=10
            )
            key = f"{name}/{kind}/{slots}"
            found.rollouts[key] = [
                (r.token_ids, r.behavior_logprobs, r.finish_reason) for r in batch.rollouts
            ]
            found.executions[key] = (batch.stats.attention_executions, batch.stats.mlp_executions)
            if key.endswith(("sampled/64", "greedy/64")):
                found.uncached_gap[key] = uncached_gap(policy, batch)


def run_passes(policy: Policy, plan: LayerSkipPlan, name: str, found: Decoded) -> None:
    """Decode given sequences on every path, and without a cache."""
    sequences = given_sequences()
    for path in ("torch",) if native.problem() else ("torch", "native"):
        decoder = PolicyDecoder(policy, native_kernels=path == "native")
        assert decoder.uses_native_kernels == (path == "native")
        logits = cached_logits(decoder, plan, sequences)
        if logits is not None:
            found.cached_logits[f"{name}/{path}"] = logits.numpy()
    if policy.context.world_size == 1:
        found.uncached_logits[name] = uncached_logits(policy, sequences).numpy()


def abandon(decoder: PolicyDecoder, sampling: SamplingParams, plan: LayerSkipPlan) -> None:
    """Give up a generation of several slot groups in its eighth round."""
    answers = iter([False, True])
    with pytest.raises(GenerationInterrupted):
        RolloutEngine(max_slots=5).generate(
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


SLOTS = (6, 1, 8, 3, 0, 5)
"""Slot of each sequence; the last two take over the prompts of the first and the fourth."""
PROMPT_OF = (0, 1, 2, 3, 0, 3)
"""The given sequence that each of these six continues."""


def given_passes() -> list[tuple[list[int], list[int], TokenPass]]:
    """Prompts in chunks, shared prompts, rows of any order, place and width, all in few passes.

    With each pass the sequences whose tokens its rows are, and those of its pieces.
    """
    later = [place + 1 for place in LENGTHS]
    return [
        ([], [0, 2], rows_of([], [], pieces=(piece(0, 0, 3), piece(2, 0, 3)))),
        # The third prompt goes on; what the fourth one's rows look at is written in this pass.
        (
            [3, 0, 5, 1, 4],
            [2, 3, 1],
            rows_of(
                [3, 0, 5, 1, 4],
                [2, 3, 2, 1, 3],
                pieces=(piece(2, 3, 3), piece(3, 0, 2), piece(1, 0, 1)),
                copies=(PrefixCopy(SLOTS[0], (SLOTS[4],), 3), PrefixCopy(SLOTS[3], (SLOTS[5],), 2)),
            ),
        ),
        ([2, 0, 1, 3, 4, 5], [], rows_of([2, 0, 1, 3, 4, 5], [6, 4, 2, 3, 4, 3])),
        # Drafts are verified: several tokens to a row.
        *(
            (order, [], rows_of(order, [later[PROMPT_OF[s]] + step - (s == 2) for s in order], 2))
            for order, step in (([5, 0, 2, 1, 4, 3], 0), ([1, 0, 3, 4, 2, 5], 2))
        ),
        ([2], [], rows_of([2], [11])),
    ]


def rows_of(sequences: list[int], positions: list[int], width: int = 1, **more: Any) -> TokenPass:
    """A pass whose rows are these sequences' tokens from these positions on."""
    slots = torch.tensor([SLOTS[s] for s in sequences], dtype=torch.int64)
    span = max(positions, default=-width) + width
    return TokenPass(slots, torch.tensor(positions, dtype=torch.int64), width, span, **more)


def piece(sequence: int, start: int, length: int) -> PromptPiece:
    """Some tokens of a sequence's prompt."""
    return PromptPiece(SLOTS[sequence], start, length)


def cached_logits(
    decoder: PolicyDecoder, plan: LayerSkipPlan, sequences: list[list[int]]
) -> Tensor | None:
    """Logits after each prompt and each token behind it, `[six, steps + 1, vocab]`."""
    steps = len(sequences[0]) - LENGTHS[0]
    cache = decoder.new_cache(plan, max(SLOTS) + 1, max(LENGTHS) + steps)
    found: dict[tuple[int, int], Tensor] = {}
    decoder.begin()
    for rows, with_pieces, tokens in given_passes():
        places = [
            (s, position + j)
            for s, position in zip(rows, tokens.positions.tolist(), strict=True)
            for j in range(tokens.width)
        ]
        ids = [sequences[PROMPT_OF[s]][position] for s, position in places]
        for s, part in zip(with_pieces, tokens.pieces, strict=True):
            ids += sequences[PROMPT_OF[s]][part.start : part.start + part.length]
        logits = run_pass(decoder, torch.tensor(ids), tokens, cache, plan)
        if logits is not None:
            assert logits.dtype == torch.float32
            found.update(zip(places, whole_vocabulary(decoder, logits), strict=True))
    here = {layer.index for chunk in decoder.weights for layer in chunk}
    runs = [
        [len(given_passes()) * (i in here and not skips(i)) for i in range(plan.num_layers)]
        for skips in (plan.skips_attention, plan.skips_mlp)
    ]
    assert decoder.executions().tolist() == runs
    if not found:
        return None
    return torch.stack(
        [
            torch.stack([found[s, LENGTHS[prompt] - 1 + step] for step in range(steps + 1)])
            for s, prompt in enumerate(PROMPT_OF)
        ]
    )


def run_pass(
    decoder: PolicyDecoder, ids: Tensor, tokens: TokenPass, cache: Any, plan: LayerSkipPlan
) -> Tensor | None:
    """Take a pass through every chunk of this process; logits on the last stage."""
    for chunk in range(decoder.num_chunks):
        inputs = ids
        if not decoder.link.is_first or chunk > 0:
            shape = decoder.hidden_shape(tokens.num_tokens)
            inputs = decoder.link.receive_previous(shape, decoder.dtype, decoder.device)
        before = inputs.clone()
        output = decoder.forward(chunk, inputs, tokens, cache, plan)
        assert torch.equal(inputs, before), "a pass changed what it was given"
        if decoder.link.is_last and chunk == decoder.num_chunks - 1:
            assert output.shape[0] == tokens.num_row_tokens
            return output
        decoder.link.send_next(output).wait()
    return None


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
    """Raise unless the decoder reads the very parameters of the policy, moved ones too."""
    moved = policy.layers[0].self_attention.linear_proj.weight
    moved.data = moved.data.clone()
    decoder.begin()
    own = {p.data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
    for chunk in decoder.weights:
        for layer in chunk:
            for weight in parameters_of(layer):
                assert weight.data_ptr() in own, f"a weight of layer {layer.index} was copied"


def check_cache_follows_plan(decoder: PolicyDecoder, plan: LayerSkipPlan) -> None:
    """Raise unless only running attention has a cache, which plans that run more may not use."""
    here = {layer.index for chunk in decoder.weights for layer in chunk}
    cache = decoder.new_cache(plan, 2, 3)
    assert set(cache.keys) == {index for index in here if not plan.skips_attention(index)}
    assert set(cache.values) == set(cache.keys)
    assert decoder.kv_bytes(plan, 2, 3) == cache.num_bytes
    tokens, ids = rows_of([1], [0]), torch.zeros(1, dtype=torch.int64)
    full = LayerSkipPlan.full(plan.num_layers)
    for chunk, layers in enumerate(decoder.weights):
        if any(plan.skips_attention(layer.index) for layer in layers):
            with pytest.raises(RuntimeError, match="the cache was made for plan"):
                decoder.forward(chunk, ids, tokens, cache, full)


def check_least_is_agreed_on(decoder: PolicyDecoder) -> None:
    """Raise unless every process gets the smallest number; memory is some, and not all there is."""
    rank = dist.get_rank()
    assert decoder.agree_on_least(10 - rank) == 10 - (dist.get_world_size() - 1)
    free = psutil.virtual_memory().available
    assert 0 < decoder.free_bytes() < 1.2 * free / dist.get_world_size()
