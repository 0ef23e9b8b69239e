"""The engine's bookkeeping: rows, positions, caches and random numbers stay together.

Pipelines of processes and the transformer are tested in tests/distributed.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from hash_model import DRAFT_PLAN, PLAN, VOCAB_SIZE, HashModel
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.counter_random import Stream, uniforms
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rollout.completion import Completion
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.types import Prompt, SamplingParams


def complete_alone(
    model: HashModel, prompt: Prompt, prompt_index: int, sample: int, sampling: SamplingParams
) -> tuple[list[int], list[float]]:
    """One completion without any engine."""
    state = torch.tensor([0])
    for position, token in enumerate(prompt.token_ids):
        state = model.step(state, torch.tensor(token), torch.tensor(position))
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < (prompt.max_new_tokens or sampling.max_new_tokens):
        key = (sampling.seed, sampling.step, prompt_index, sample, len(tokens))
        token, logprob = sample_tokens(
            model.table[state],
            uniforms(int(Stream.SAMPLING), *key)[None],
            sampling,
            vocab_start=0,
            vocab_size=VOCAB_SIZE,
        )
        tokens.append(int(token))
        logprobs.append(float(logprob))
        if tokens[-1] in sampling.stop_token_ids:
            break
        position = len(prompt.token_ids) + len(tokens) - 1
        state = model.step(state, token, torch.tensor(position))
    return tokens, logprobs


PROMPTS = st.lists(
    st.builds(
        Prompt,
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9).map(tuple),
        st.just(""),
        max_new_tokens=st.none() | st.integers(1, 12),
    ),
    min_size=1,
    max_size=5,
)
ENGINES = st.builds(
    RolloutEngine,
    st.none() | st.integers(1, 9),
    max_num_batched_tokens=st.integers(1, 20),
    batching=st.sampled_from(["continuous", "static"]),
)


@settings(max_examples=25)
@given(
    PROMPTS,
    st.integers(1, 4),
    ENGINES,
    st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=3),
    st.integers(0, 50),
)
def test_rollouts_equal_completions_made_alone(
    prompts: list[Prompt],
    num_samples: int,
    engine: RolloutEngine,
    stops: set[int],
    first_prompt_index: int,
) -> None:
    sampling = SamplingParams(12, stop_token_ids=tuple(stops), seed=3, step=5)
    model = HashModel()
    batch = engine.generate(
        model, prompts, num_samples, sampling, PLAN, first_prompt_index=first_prompt_index
    )
    assert batch.num_prompts == len(prompts)
    for place, rollout in enumerate(batch.rollouts):
        prompt, sample = divmod(place, num_samples)
        assert rollout.prompt == prompts[prompt]
        assert rollout.prompt_index == first_prompt_index + prompt
        expected = complete_alone(
            model, rollout.prompt, first_prompt_index + prompt, sample, sampling
        )
        assert (list(rollout.token_ids), list(rollout.behavior_logprobs)) == expected
        stopped = rollout.token_ids[-1] in stops
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert rollout.timings is not None
        assert 0 < rollout.timings.first_token <= rollout.timings.finished <= batch.stats.seconds
    assert batch.stats.generated_tokens == sum(len(r.token_ids) for r in batch.rollouts)
    # A prompt is prefilled once, however its samples came into their slots.
    assert batch.stats.prefilled_tokens == sum(len(p.token_ids) - 1 for p in prompts)
    assert batch.stats.decoded_tokens == model.rows_run
    if engine.batching == "continuous":
        assert batch.stats.decoded_tokens == batch.stats.generated_tokens
    most = max(1, engine.max_num_batched_tokens)
    for tokens in model.passes:
        assert tokens.num_tokens <= most or sum(p.length for p in tokens.pieces) <= 1


@settings(max_examples=20)
@given(PROMPTS, st.integers(1, 3), ENGINES, st.randoms(use_true_random=False))
def test_places_may_be_given_and_completions_are_told_as_they_end(
    prompts: list[Prompt], num_samples: int, engine: RolloutEngine, random: Random
) -> None:
    """A part of a batch, in any order, has the completions that it has in the whole."""
    sampling = SamplingParams(12, stop_token_ids=(2, 5), seed=3, step=5)
    model = HashModel()
    places = [(7 << 32) | place for place in range(len(prompts))]
    whole = engine.generate(model, prompts, num_samples, sampling, PLAN, prompt_indices=places)
    chosen = random.sample(range(len(prompts)), random.randint(1, len(prompts)))
    told = []

    def finished(completion: Completion) -> None:
        told.append((completion.prompt, completion.sample, tuple(completion.token_ids)))
        assert completion.finish_reason in ("stop", "length")

    part = engine.generate(
        *(model, [prompts[i] for i in chosen], num_samples, sampling, PLAN),
        prompt_indices=[places[i] for i in chosen],
        on_finished=finished,
    )
    expected = {(r.prompt_index, r.sample_index): r.token_ids for r in whole.rollouts}
    for rollout in part.rollouts:
        assert rollout.token_ids == expected[rollout.prompt_index, rollout.sample_index]
    # Each once.
    assert sorted(told) == sorted(
        (chosen.index(r.prompt_index & 0xFFFF), r.sample_index, r.token_ids) for r in part.rollouts
    )


@settings(max_examples=20)
@given(PROMPTS, st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 20))
def test_speculation_keeps_rows_and_counts_together(
    prompts: list[Prompt], num_samples: int, slots: int, most_drafted: int, batched: int
) -> None:
    """Greedy drafts change how a completion is made, never the completion."""
    sampling = SamplingParams(12, greedy=True, stop_token_ids=(3,))
    model = HashModel()
    plain = RolloutEngine(slots).generate(model, prompts, num_samples, sampling, PLAN)
    engine = RolloutEngine(slots, max_num_batched_tokens=batched, max_draft_tokens=most_drafted)
    drafted = engine.generate(model, prompts, num_samples, sampling, PLAN, draft_plan=DRAFT_PLAN)
    assert drafted.rollouts == plain.rollouts
    stats = drafted.stats
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    assert stats.decoded_tokens == model.rows_run
    assert stats.prefilled_tokens == sum(len(p.token_ids) - 1 for p in prompts)


def test_speculation_drafts_and_saves_passes() -> None:
    sampling = SamplingParams(40, greedy=True)
    prompts = [Prompt((i,), "") for i in range(4)]
    model = HashModel()
    model.draft_table = model.table
    stats = RolloutEngine().generate(model, prompts, 1, sampling, PLAN, draft_plan=DRAFT_PLAN).stats
    verifications = sum(tokens.width > 1 for tokens in model.passes)
    assert stats.accept_rate == 1.0
    assert 0 < verifications < 20


def test_finished_rows_leave_and_others_come() -> None:
    """Slots stay full: rows run for nothing but tokens that are kept."""
    sampling = SamplingParams(40, stop_token_ids=(0, 1, 2))
    model = HashModel()
    prompts = [Prompt((i % VOCAB_SIZE, i // VOCAB_SIZE), "") for i in range(40)]
    batch = RolloutEngine(8).generate(model, prompts, 1, sampling, PLAN)
    waiting = 40
    for tokens in model.passes:
        waiting -= len(tokens.pieces)
        assert len(tokens.slots) == 8 or waiting == 0
    static = RolloutEngine(8, batching="static").generate(model, prompts, 1, sampling, PLAN)
    assert static.rollouts == batch.rollouts
    assert static.stats.decoded_tokens > 1.5 * batch.stats.decoded_tokens


def test_stop_strings_end_a_response() -> None:
    """Also where the string spans tokens; the limit still holds for others."""
    sampling = SamplingParams(40, seed=1, stop_strings=("1,2", "7,"))

    def detokenize(ids: tuple[int, ...]) -> str:
        return "".join(f"{token}," for token in ids)

    prompts = [Prompt((i,), "") for i in range(8)]
    batch = RolloutEngine(3).generate(
        HashModel(), prompts, 2, sampling, PLAN, detokenize=detokenize
    )
    plain = RolloutEngine(3).generate(HashModel(), prompts, 2, SamplingParams(40, seed=1), PLAN)
    reasons = set()
    for stopped, unstopped in zip(batch.rollouts, plain.rollouts, strict=True):
        texts = [detokenize(unstopped.token_ids[:n]) for n in range(41)]
        length = next((n for n, text in enumerate(texts) if "1,2" in text or "7," in text), 40)
        assert stopped.token_ids == unstopped.token_ids[:length]
        assert stopped.text == texts[length]
        reasons.add(stopped.finish_reason)
    assert "stop" in reasons
    with pytest.raises(ValueError, match="need `detokenize`"):
        RolloutEngine().generate(HashModel(), prompts, 1, sampling, PLAN)


def test_logits_that_are_no_distribution_end_one_response_alone() -> None:
    model = HashModel()
    prompts = [Prompt((i,), "") for i in range(8)]
    sampling = SamplingParams(20, seed=2)
    sound = RolloutEngine(3).generate(model, prompts, 1, sampling, PLAN)
    victim = sound.rollouts[4]
    state = torch.tensor(0)
    for position, token in enumerate((*victim.prompt.token_ids, *victim.token_ids[:6])):
        state = model.step(state, torch.tensor(token), torch.tensor(position))
    model.table[state, 5] = float("nan")
    batch = RolloutEngine(3).generate(model, prompts, 1, sampling, PLAN)
    broken = batch.rollouts[4]
    assert (broken.token_ids, broken.finish_reason) == (victim.token_ids[:6], "nan")
    assert len(broken.behavior_logprobs) == 6
    others = [i for i in range(8) if i != 4]
    assert [batch.rollouts[i] for i in others] == [sound.rollouts[i] for i in others]
    # Whatever is not finite in its slot is gone before the slot's next sequence.
    assert len(model.caches[-1].cleared) == 1


def test_end_of_sequence_at_once_and_a_single_token() -> None:
    everything = tuple(range(VOCAB_SIZE))
    prompts = [Prompt((1, 2, 3), ""), Prompt((4,), "")]
    sampling = SamplingParams(9, stop_token_ids=everything)
    batch = RolloutEngine().generate(HashModel(), prompts, 2, sampling, PLAN)
    assert [len(r.token_ids) for r in batch.rollouts] == [1] * 4
    assert {r.finish_reason for r in batch.rollouts} == {"stop"}
    batch = RolloutEngine().generate(HashModel(), prompts, 2, SamplingParams(1), PLAN)
    assert {(len(r.token_ids), r.finish_reason) for r in batch.rollouts} == {(1, "length")}


def test_no_prompts_make_an_empty_batch() -> None:
    batch = RolloutEngine(4).generate(HashModel(), [], 2, SamplingParams(3), PLAN)
    assert batch.rollouts == ()
    assert batch.stats.generated_tokens == 0


def test_text_comes_from_the_tokens() -> None:
    batch = RolloutEngine(4).generate(
        HashModel(), [Prompt((1,), "")], 1, SamplingParams(3), PLAN, detokenize=repr
    )
    assert batch.rollouts[0].text == repr(batch.rollouts[0].token_ids)


@pytest.mark.parametrize(
    ("prompt", "plan", "message"),
    [
        ((), PLAN, "no tokens"),
        ((1,) * 62, PLAN, "has 62 tokens"),
        ((1,), LayerSkipPlan.parse("0", 2), "under plan 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt, plan, message) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutEngine(4).generate(HashModel(), [Prompt(prompt, "")], 1, SamplingParams(3), plan)


def test_a_prompt_has_room_for_a_token() -> None:
    prompt = Prompt((1,), "", max_new_tokens=0)
    with pytest.raises(ValueError, match="must be at least 1, found 0"):
        RolloutEngine(4).generate(HashModel(), [prompt], 1, SamplingParams(3), PLAN)


@pytest.mark.parametrize("options", [{"max_slots": 0}, {"max_num_batched_tokens": 0}])
def test_engines_without_room_are_refused(options) -> None:
    with pytest.raises(ValueError, match="must be at least 1, found 0"):
        RolloutEngine(**options)


def test_slots_follow_from_memory() -> None:
    """A slot of 12 positions takes 96 bytes here, and half of what is free may be used."""
    prompts = [Prompt((1, 2, 3), "")] * 9
    model = HashModel()
    model.room = 2 * 96 * 5 + 10
    batch = RolloutEngine().generate(model, prompts, 1, SamplingParams(10), PLAN)
    assert (batch.stats.num_slots, batch.stats.kv_cache_bytes) == (5, (5 * 96,))
    batch = RolloutEngine(kv_cache_bytes=96 * 3).generate(
        model, prompts, 1, SamplingParams(10), PLAN
    )
    assert batch.stats.num_slots == 3
    model.room = 100
    with pytest.raises(UserError, match=r"one sequence of 12 tokens .* missing"):
        RolloutEngine().generate(model, prompts, 1, SamplingParams(10), PLAN)
    assert len(model.caches) == 2, "memory was taken before it was known to be there"


def law_of_two_tokens(model: HashModel, table: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Probability of every pair of first tokens, `[vocab, vocab]` float64."""
    state = torch.tensor(0)
    for position, token in enumerate(prompt.token_ids):
        state = model.step(state, torch.tensor(token), torch.tensor(position))
    first = table[state].double().softmax(0)
    tokens = torch.arange(VOCAB_SIZE)
    states = model.step(state, tokens, torch.tensor(len(prompt.token_ids)))
    return first[:, None] * table[states].double().softmax(1)


def test_speculation_samples_from_the_full_policy() -> None:
    """Pairs of tokens of 6,000 completions against both laws, by total variation and chi-square."""
    model = HashModel()
    prompt = Prompt((5, 2), "")
    num_samples = 6000
    batch = RolloutEngine(max_draft_tokens=2).generate(
        model, [prompt], num_samples, SamplingParams(2, seed=7), PLAN, draft_plan=DRAFT_PLAN
    )
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    for rollout in batch.rollouts:
        counts[rollout.token_ids] += 1
    target = law_of_two_tokens(model, model.table, prompt)
    draft = law_of_two_tokens(model, model.draft_table, prompt)
    found = counts / num_samples
    # What sampling alone does to the total variation, on average, is half the sum of these.
    noise = 0.5 * (2 * target * (1 - target) / (torch.pi * num_samples)).sqrt().sum()
    assert 0.5 * (found - target).abs().sum() < 1.3 * noise
    assert 0.5 * (found - draft).abs().sum() > 4 * noise
    expected = target * num_samples
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = VOCAB_SIZE**2 - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    for rollout in batch.rollouts[:50]:
        first, second = rollout.token_ids
        assert sum(rollout.behavior_logprobs) == pytest.approx(
            float(target[first, second].log()), abs=1e-5
        )
