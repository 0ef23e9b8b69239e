"""Files in, files out: `generate` completes prompts, `score` gives completions' log-probabilities.

Every process reads the input itself. Data-parallel replicas each take a contiguous part of every
chunk of it, and rank 0 gathers and writes in input order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nested_reft_mcore.algorithm.counter_random import Stream
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, draw_plan, num_skipped_layers
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import read_checkpoint_architecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import GenerateOptions, ModelSource, ScoreOptions
from nested_reft_mcore.config.schema import ModelConfig
from nested_reft_mcore.data.completions import GivenCompletion, read_completions
from nested_reft_mcore.data.jsonl import read_json_lines
from nested_reft_mcore.data.jsonl_writer import check_output_file, write_json_lines
from nested_reft_mcore.data.prompts import read_requests
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.hf.config import read_architecture
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy, stage_of_layer
from nested_reft_mcore.mcore.pipeline import forward_logprobs
from nested_reft_mcore.observability.logging import configure_logging
from nested_reft_mcore.observability.progress import Progress
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutStats, SamplingParams
from nested_reft_mcore.training.policy_setup import load_policy, load_policy_tokenizer
from nested_reft_mcore.training.replicas import gather_from_replicas, is_replica_writer

Value = TypeVar("Value")

_GROUPS_PER_STAGE = 4
"""Slot groups of each stage in a chunk: enough to keep the stages busy, few enough to hold."""
_MICRO_BATCHES_PER_STAGE = 4
"""Micro-batches of each stage in one pipelined pass: its start and end leave stages idle."""
_PASSES_PER_CHUNK = 16
"""Passes whose sequences are sorted by length together."""


def generate_file(options: GenerateOptions, context: ParallelContext) -> None:
    """Complete the prompts of a file as `options` says. Every process calls it.

    The output appears whole or not at all. Rank 0 shows progress and prints a last line: tokens,
    tokens per second and the layers that each pipeline rank ran.

    Raises:
        UserError: a file, a line of the prompts or an option is wrong; nothing was generated.
    """
    configure_logging(rank=context.rank, world_size=context.world_size)
    check_output_file(options.output)
    model, architecture = _model(options)
    tokenizer = load_policy_tokenizer(model, options.tokenizer_path, architecture)
    prompts = _read_prompts(options, tokenizer, architecture)
    sampling = _sampling(options, tokenizer)
    plan = _generation_plan(options, architecture, context)
    policy = load_policy(model, options.parallel, context)
    totals = _GenerationTotals()
    lines = _completed(policy, prompts, options, sampling, plan, tokenizer, totals)
    _write(options.output, lines, context)
    if context.is_main:
        print(f"{options.output}: {totals.describe()}; skipped: {plan.describe()}", flush=True)


def score_file(options: ScoreOptions, context: ParallelContext) -> None:
    """Write the log-probabilities, at temperature 1, of a file's completions.

    Every process calls it. They come from the forward pass of training, not from cached decoding.
    The output appears whole or not at all.

    Raises:
        UserError: a file, a line of the input or an option is wrong; nothing was scored.
    """
    configure_logging(rank=context.rank, world_size=context.world_size)
    check_output_file(options.output)
    model, architecture = _model(options)

    @cache
    def get_tokenizer() -> Tokenizer:
        return load_policy_tokenizer(model, options.tokenizer_path, architecture)

    given = read_completions(options.input, get_tokenizer, architecture.vocab_size)
    _check_scored_lengths(given, architecture.max_position_embeddings)
    plan = _parse_plan(options.skip_layers, architecture)
    policy = load_policy(model, options.parallel, context)
    started = time.perf_counter()
    _write(options.output, _scored(policy, given, options, plan), context)
    if context.is_main:
        num_tokens = sum(len(completion.token_ids) for completion in given)
        seconds = time.perf_counter() - started
        print(
            f"{options.output}: {len(given)} completions, {num_tokens} tokens in {seconds:.1f} s "
            f"({num_tokens / seconds:,.0f} tokens/s); skipped: {plan.describe()}",
            flush=True,
        )


@dataclass
class _GenerationTotals:
    """What the chunks so far cost, over all replicas; complete on rank 0 alone."""

    num_prompts: int = 0
    num_completions: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Replicas work side by side: the slowest one's time."""
    layer_executions: list[float] = field(default_factory=list)
    """For each pipeline rank."""

    def add(self, replicas: Sequence[RolloutStats]) -> None:
        """Count a chunk."""
        self.num_tokens += sum(stats.generated_tokens for stats in replicas)
        self.seconds += max(stats.seconds for stats in replicas)
        counts = [self.layer_executions, *(stats.layer_executions for stats in replicas)]
        self.layer_executions = [sum(stage) for stage in zip(*filter(None, counts), strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of generation."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def describe(self) -> str:
        """One line for people."""
        executions = ", ".join(
            f"{count:,.1f}".removesuffix(".0") + f" on pipeline rank {stage}"
            for stage, count in enumerate(self.layer_executions)
        )
        return (
            f"{self.num_completions} completions, {self.num_tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens_per_second:,.0f} tokens/s); layers run: {executions}"
        )


def _completed(
    policy: Policy,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    sampling: SamplingParams,
    plan: LayerSkipPlan,
    tokenizer: Tokenizer,
    totals: _GenerationTotals,
) -> Iterator[Mapping[str, Any]]:
    """Output lines, in input order on rank 0 and none elsewhere; every process has to run it."""
    context = policy.context
    engine, decoder = RolloutEngine(options.slots_per_group), PolicyDecoder(policy)
    sequences = options.slots_per_group * _GROUPS_PER_STAGE * context.pipeline.size
    prompts_per_replica = max(1, sequences // options.num_samples)
    skipped = plan.describe() if plan.skipped else None
    progress = Progress("auto" if context.is_main else "off", len(prompts), title="generate")
    with policy.nested(plan), progress:
        for chunk in _cut(len(prompts), prompts_per_replica * context.data.size):
            shard = _my_part(chunk, context)
            batch = engine.generate(
                decoder,
                prompts[shard.start : shard.stop],
                options.num_samples,
                sampling,
                plan,
                first_prompt_index=shard.start,
                detokenize=tokenizer.decode if is_replica_writer(context) else None,
            )
            replicas = _gather_on_main(batch, context)
            if not replicas:
                continue
            for replica in replicas:
                for rollout in replica.rollouts:
                    yield _completion_line(rollout, with_logprobs=options.logprobs)
            totals.add([replica.stats for replica in replicas])
            totals.num_prompts += len(chunk)
            totals.num_completions += len(chunk) * options.num_samples
            metrics = {"perf/throughput": totals.tokens_per_second}
            progress.update(totals.num_prompts, metrics, skipped=skipped)


def _completion_line(rollout: Rollout, *, with_logprobs: bool) -> Mapping[str, Any]:
    line: dict[str, Any] = {
        "prompt_index": rollout.prompt_index,
        "sample_index": rollout.sample_index,
        "prompt_token_ids": rollout.prompt.token_ids,
        "token_ids": rollout.token_ids,
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
    }
    if with_logprobs:
        line["logprobs"] = _json_numbers(rollout.behavior_logprobs, rollout.prompt.source)
    return line


def _read_prompts(
    options: GenerateOptions, tokenizer: Tokenizer, architecture: ModelArchitecture
) -> list[Prompt]:
    """The prompts of the file, each with room for its completion."""
    prompts = read_requests(options.prompts, tokenizer, vocab_size=architecture.vocab_size)
    if options.template == "chat":
        records = read_json_lines(options.prompts)
        prompts = [
            _as_chat(prompt, tokenizer) if record.has("prompt") else prompt
            for prompt, record in zip(prompts, records, strict=True)
        ]
    room = architecture.max_position_embeddings - options.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {options.max_new_tokens}: the model has "
            f"{architecture.max_position_embeddings} positions; expected fewer new tokens, so that "
            "a prompt fits before them"
        )
    for prompt in prompts:
        if len(prompt.token_ids) > room:
            raise UserError(
                f"{prompt.source}: the prompt has {len(prompt.token_ids)} tokens; expected at most "
                f"{room}, the model's {architecture.max_position_embeddings} positions less "
                f"--max-new-tokens {options.max_new_tokens}"
            )
    return prompts


def _as_chat(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    """The prompt's text as what a user says."""
    try:
        token_ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])
    except UserError as error:
        raise UserError(f"{prompt.source}: {error}") from error
    return replace(prompt, token_ids=tuple(token_ids), text=tokenizer.decode(token_ids))


def _sampling(options: GenerateOptions, tokenizer: Tokenizer) -> SamplingParams:
    """How to choose tokens, and which of them end a completion."""
    stop_token_ids = set(tokenizer.eos_token_ids)
    for token in options.stop_tokens:
        found = tokenizer.token_to_id(token)
        if found is None:
            raise UserError(
                f"--stop-token {token!r}: the tokenizer has no such token; expected one spelled "
                "exactly as in its vocabulary"
            )
        stop_token_ids.add(found)
    try:
        return SamplingParams(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            greedy=options.greedy,
            top_k=options.top_k,
            top_p=options.top_p,
            stop_token_ids=tuple(sorted(stop_token_ids)),
            seed=options.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _generation_plan(
    options: GenerateOptions, architecture: ModelArchitecture, context: ParallelContext
) -> LayerSkipPlan:
    """The plan that is given, or drawn as the first step of a run with this seed would draw it."""
    if options.skip_ratio is None:
        return _parse_plan(options.skip_layers, architecture)
    num_layers = architecture.num_layers
    try:
        return draw_plan(
            options.law,
            num_layers,
            num_skipped_layers(options.skip_ratio, num_layers),
            options.border_layers,
            stage_of_layer(num_layers, context.pipeline.size, context.num_chunks),
            (Stream.PLAN, options.seed, 0),
        )
    except ValueError as error:
        raise UserError(f"--skip-ratio {options.skip_ratio}: {error}") from error


def _parse_plan(text: str | None, architecture: ModelArchitecture) -> LayerSkipPlan:
    try:
        return LayerSkipPlan.parse(text or "", architecture.num_layers)
    except ValueError as error:
        raise UserError(f"--skip-layers {text}: {error}") from error


def _scored(
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
        for chunk in _cut(len(given), rows * _PASSES_PER_CHUNK * context.data.size):
            shard = _my_part(chunk, context)
            scores = _score(policy, given[shard.start : shard.stop], options, rows)
            replicas = _gather_on_main(scores, context)
            if not replicas:
                continue
            gathered = [logprobs for replica in replicas for logprobs in replica]
            for completion, logprobs in zip(given[chunk.start : chunk.stop], gathered, strict=True):
                yield {
                    "prompt_token_ids": completion.prompt_token_ids,
                    "token_ids": completion.token_ids,
                    "logprobs": _json_numbers(logprobs, completion.source),
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
    for part in _cut(len(order), rows):
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


def _check_scored_lengths(given: Sequence[GivenCompletion], num_positions: int) -> None:
    for completion in given:
        # The last token is predicted, never read.
        length = len(completion.prompt_token_ids) + len(completion.token_ids) - 1
        if length > num_positions:
            raise UserError(
                f"{completion.source}: prompt and completion have {length + 1} tokens; expected "
                f"at most {num_positions + 1}, for the model has {num_positions} positions"
            )


def _model(options: ModelSource) -> tuple[ModelConfig, ModelArchitecture]:
    model = ModelConfig(hf_path=options.hf, checkpoint=options.checkpoint, dtype=options.dtype)
    if options.hf is not None:
        return model, read_architecture(Path(options.hf))
    return model, read_checkpoint_architecture(str(options.checkpoint))


def _cut(count: int, size: int) -> Iterator[range]:
    """The places 0 to `count` in ranges of `size`, the last one shorter."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _my_part(chunk: range, context: ParallelContext) -> range:
    """What this process's replica takes of a chunk."""
    shard = shard_range(len(chunk), context.data.rank, context.data.size)
    return range(chunk.start + shard.start, chunk.start + shard.stop)


def _gather_on_main(value: Value, context: ParallelContext) -> list[Value]:
    """The value of every replica on rank 0, in order; nothing elsewhere."""
    if not is_replica_writer(context):
        return []
    gathered = gather_from_replicas(value, context)
    return gathered if context.is_main else []


def _write(output: str, lines: Iterator[Mapping[str, Any]], context: ParallelContext) -> None:
    """Run `lines` on every process; rank 0 writes them."""
    if context.is_main:
        write_json_lines(output, lines)
    else:
        for _ in lines:
            raise RuntimeError("a process other than rank 0 has a line to write")


def _json_numbers(logprobs: Sequence[float], source: str) -> list[float]:
    """Float32 numbers with the fewest digits that give the same bits back.

    Raises:
        UserError: one is not finite.
    """
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise UserError(
            f"{source}: a log-probability is {next(x for x in logprobs if not math.isfinite(x))}; "
            "expected finite numbers: are the model's weights finite?"
        )
    return [float(str(np.float32(logprob))) for logprob in logprobs]
