"""`rollout.ignore_eos`: training rollouts have a fixed length, evaluation has not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from nested_reft_mcore.config.load import config_from_dict
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.planning.hardware import Assumptions
from nested_reft_mcore.planning.workload import mean_response
from nested_reft_mcore.rollout.completion import StopRule
from nested_reft_mcore.rollout.scheduler import Batching, Scheduler
from nested_reft_mcore.rollout.types import Prompt, SamplingParams
from nested_reft_mcore.training.evaluation_setup import evaluation_sampling
from nested_reft_mcore.training.sampling import training_sampling

EOS, STOP = 2, 5
LIMIT = 7
TOKENIZER = cast(
    Tokenizer,
    SimpleNamespace(eos_token_ids=frozenset({EOS}), token_to_id={"<stop>": STOP}.get),
)


def config_with(**rollout: Any) -> Config:
    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 1, "num_query_groups": 1}
    shape |= {"ffn_hidden_size": 8, "vocab_size": 8, "max_position_embeddings": 32}
    return config_from_dict(
        {
            "run_dir": "run",
            "model": {"architecture": shape},
            "rollout": {"max_new_tokens": LIMIT, **rollout},
        }
    )


def lengths(sampling: SamplingParams, batching: Batching, token: int) -> list[int]:
    """Of six completions in two slots to which nothing but this token is ever given."""
    scheduler = Scheduler(
        StopRule(sampling, None),
        num_slots=2,
        num_lanes=1,
        max_num_batched_tokens=16,
        batching=batching,
    )
    scheduler.submit([Prompt((1, 1, 1), "a"), Prompt((1, 1), "b")], 3)
    (lane,) = scheduler.lanes
    while not scheduler.is_done:
        step = scheduler.next_step(lane)
        assert step is not None
        scheduler.accept(lane, step, [[token]] * len(step.rows), 0.0)
    return [len(completion.token_ids) for completion in scheduler.completions]


@pytest.mark.parametrize("batching", get_args(Batching))
def test_completions_go_on_past_the_end_of_sequence(batching: Batching) -> None:
    fixed = training_sampling(config_with(ignore_eos=True), TOKENIZER, 0)
    assert lengths(fixed, batching, EOS) == [LIMIT] * 6
    usual = training_sampling(config_with(), TOKENIZER, 0)
    assert lengths(usual, batching, EOS) == [1] * 6


def test_stop_tokens_still_end_a_completion() -> None:
    sampling = training_sampling(config_with(ignore_eos=True, stop_tokens=["<stop>"]), TOKENIZER, 0)
    assert lengths(sampling, "continuous", STOP) == [1] * 6


def test_evaluation_ends_where_the_policy_ends() -> None:
    assert evaluation_sampling(config_with(ignore_eos=True), TOKENIZER).stop_token_ids == (EOS,)


def test_planning_takes_the_fixed_length() -> None:
    assumed = Assumptions(response_fill=0.5)
    assert mean_response(config_with(ignore_eos=True), assumed) == LIMIT
    assert mean_response(config_with(), assumed) == LIMIT / 2
