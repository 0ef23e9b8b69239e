"""Log-probabilities of many completions, chunk by chunk, as the lines that `score` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.inference import ScoreOptions
from nested_reft_mcore.data.completions import GivenCompletion
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.pipeline import forward_logprobs
from nested_reft_mcore.observability.progress import Progress
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import Prompt, Rollout
from nested_reft_mcore.training.chunks import cut, gather_on_main, json_numbers, my_part

_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches of each stage in one pipelined pass: its start and end leave stages idle."""
_PASSES_PER_CHUNK = 16
"""Passes whose sequences are sorted by length together."""


def scored_lines(
    policy: Policy, given: Sequence[GivenCompletion], options: ScoreOptions, plan: LayerSkipPlan
) -> Iterator[Mapping[str, Any]]:
    """Output lines, in input order on rank 0 and none elsewhere; every process has to run it."""
    context = policy.context
    # One stage has nothing to wait for: the less in a pass, the less padding.
    num_stages = context.pipeline.size
    num_micro_batches = 1 if num_stages == 1 else num_stages * _MICRO_BATCHES_PER_STAGE
    rows = options.batch_size * num_micro_batches
    progress = Progress("auto" if context.is_main else "off", len(given), title="score")
    with policy.nested(plan), progress:
        for chunk in cut(len(given), rows * _PASSES_PER_CHUNK * context.data.size):
            shard = my_part(chunk, context)
            scores = _score(policy, given[shard.start : shard.stop], options, rows)
            replicas = gather_on_main(scores, context)
            if not replicas:
                continue
            gathered = [logprobs for replica in replicas for logprobs in replica]
            for completion, logprobs in zip(given[chunk.start : chunk.stop], gathered, strict=True):
                yield {
                    "prompt_token_ids": completion.prompt_token_ids,
                    "token_ids": completion.token_ids,
                    "logprobs": json_numbers(logprobs, completion.source),
                }
            progress.update(chunk.stop, {})


def _score(
    policy: Policy, given: Sequence[GivenCompletion], options: ScoreOptions, rows: int
) -> list[list[float]]:
    """Log-probabilities of each completion's tokens, `rows` of similar length in one pass."""
    scores: list[list[float]] = [[] for _ in given]
    # The longest first: what does not fit into memory shows at once.
    order = sorted(
        (place for place, completion in enumerate(given) if completion.token_ids),
        key=lambda place: -len(given[place].prompt_token_ids) - len(given[place].token_ids),
    )
    for part in cut(len(order), rows):
        places = order[part.start : part.stop]
        batch = TrainingBatch.from_rollouts(
            [_as_rollout(given[place]) for place in places],
            advantages=torch.zeros(len(places)),
            pad_token_id=0,
            pad_to_multiple=(
                policy.context.tensor.size if options.parallel.sequence_parallel else 1
            ),
        )
        logprobs = forward_logprobs(
            policy, batch, micro_batch_size=options.batch_size, temperature=1.0
        )
        for place, row, mask in zip(places, logprobs, batch.response_mask, strict=True):
            scores[place] = row[mask].tolist()
    return scores


def _as_rollout(completion: GivenCompletion) -> Rollout:
    """A row for a batch; how its tokens came about plays no part."""
    return Rollout(
        prompt=Prompt(completion.prompt_token_ids, "", source=completion.source),
        prompt_index=0,
        sample_index=0,
        token_ids=completion.token_ids,
        behavior_logprobs=(0.0,) * len(completion.token_ids),
        finish_reason="length",
    )
