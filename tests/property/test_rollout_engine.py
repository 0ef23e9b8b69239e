"""The engine's bookkeeping: rows, positions, caches and random numbers stay together.

The model is a real one of its kind: its logits hang on every token so far and on its position, so a
row that is mixed up with another, or a token that is lost, shows. Pipelines of processes and the
transformer are tested in tests/distributed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_reft_mcore.algorithm.counter_random import Stream, uniforms
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.pipeline_link import PipelineLink
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.slot_group import cut_into_groups
from nested_reft_mcore.rollout.types import Prompt, SamplingParams

VOCAB_SIZE = 11
NUM_STATES = 1009
PLAN = LayerSkipPlan.full(1)


class RunningState:
    """Cache of the model below: one number per row."""

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.states = torch.zeros_like(source)

    def select(self, rows: Tensor) -> None:
        self.source, self.states = self.source[rows], self.states[rows]


class HashModel:
    """A finite automaton over (state, token, position); its state picks a row of logits."""

    def __init__(self) -> None:
        self.link = PipelineLink()
        self.num_chunks = 1
        self.tensor_group = None
        self.vocab_start = 0
        self.vocab_size = VOCAB_SIZE
        self.hidden_size = 1
        self.max_length = 64
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.stage_of_layer = (0,)
        self.plan = PLAN
        self.table = torch.randn(NUM_STATES, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
        self.rows_run = 0

    def begin(self) -> None:
        self.rows_run = 0

    def executions(self) -> Tensor:
        return torch.full((2, 1), self.rows_run)

    def new_cache(self, source: Tensor, max_length: int) -> RunningState:
        return RunningState(source)

    def step(self, states: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        return (states * 31 + tokens * 7 + positions * 3 + 1) % NUM_STATES

    def prefill(self, chunk: int, inputs: Tensor, lengths: Tensor, cache: RunningState) -> Tensor:
        states = torch.zeros_like(lengths)
        for position in range(inputs.shape[1]):
            stepped = self.step(states, inputs[:, position], torch.tensor(position))
            states = torch.where(position < lengths, stepped, states)
        cache.states = states[cache.source]
        self.rows_run += len(lengths)
        return self.table[states]

    def decode(
        self,
        chunk: int,
        inputs: Tensor,
        positions: Tensor,
        span: int,
        ragged: bool,
        cache: RunningState,
    ) -> Tensor:
        assert int(positions.max()) < span
        assert ragged or len(set(positions.tolist())) == 1
        cache.states = self.step(cache.states, inputs[:, 0], positions)
        self.rows_run += len(positions)
        return self.table[cache.states]


def complete_alone(
    model: HashModel, prompt: Prompt, prompt_index: int, sample: int, sampling: SamplingParams
) -> tuple[list[int], list[float]]:
    """One completion without any engine."""
    state = torch.tensor([0])
    for position, token in enumerate(prompt.token_ids):
        state = model.step(state, torch.tensor(token), torch.tensor(position))
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < sampling.max_new_tokens:
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
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6), min_size=1, max_size=5
)


@settings(max_examples=40)
@given(
    PROMPTS,
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=3),
    st.integers(0, 50),
)
def test_rollouts_equal_completions_made_alone(
    prompt_ids: list[list[int]],
    num_samples: int,
    slots: int,
    max_new_tokens: int,
    stops: set[int],
    first_prompt_index: int,
) -> None:
    prompts = [Prompt(tuple(ids), "") for ids in prompt_ids]
    sampling = SamplingParams(max_new_tokens, stop_token_ids=tuple(stops), seed=3, step=5)
    model = HashModel()
    batch = RolloutEngine(slots).generate(
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
    assert batch.stats.generated_tokens == sum(len(r.token_ids) for r in batch.rollouts)


def test_finished_rows_leave() -> None:
    """Half-empty groups shrink: fewer rows run than if all stayed to the end."""
    sampling = SamplingParams(40, stop_token_ids=(0, 1, 2))
    model = HashModel()
    prompts = [Prompt((i % VOCAB_SIZE, i // VOCAB_SIZE), "") for i in range(40)]
    batch = RolloutEngine(40).generate(model, prompts, 1, sampling, PLAN)
    longest = max(len(rollout.token_ids) for rollout in batch.rollouts)
    assert model.rows_run < 0.6 * 40 * longest
    assert model.rows_run <= 2 * batch.stats.generated_tokens + 40


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 20), st.integers(1, 5))
def test_groups_cover_every_sequence_once_and_fit(
    num_prompts: int, num_samples: int, slots: int, num_stages: int
) -> None:
    groups = cut_into_groups(num_prompts, num_samples, slots, num_stages)
    total = num_prompts * num_samples
    assert [number for group in groups for number in group] == list(range(total))
    assert all(0 < len(group) <= slots for group in groups)
    assert len(groups) >= min(num_stages, total)
    if num_samples <= slots and num_prompts >= num_stages:
        assert all(group.start % num_samples == 0 for group in groups)


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
        ((1,), LayerSkipPlan.parse("0", 1), "under plan 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt, plan, message) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutEngine(4).generate(HashModel(), [Prompt(prompt, "")], 1, SamplingParams(3), plan)
