"""Files in, files out: `generate` completes prompts, `score` gives completions' log-probabilities.

Every process reads the input itself. Data-parallel replicas each take a contiguous part of every
chunk of it, and rank 0 gathers and writes in input order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from nested_reft_mcore.algorithm.counter_random import Stream
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, draw_plan, num_skipped_layers
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import GenerateOptions, ModelSource, ScoreOptions
from nested_reft_mcore.config.layout import stage_of_layer
from nested_reft_mcore.config.probe import ProbeOptions
from nested_reft_mcore.config.schema import ModelConfig
from nested_reft_mcore.data.completions import GivenCompletion, read_completions
from nested_reft_mcore.data.jsonl import read_json_lines
from nested_reft_mcore.data.jsonl_writer import check_output_file
from nested_reft_mcore.data.requests import read_requests
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.rollout.types import Prompt, SamplingParams
from nested_reft_mcore.training.chunks import write_from_main
from nested_reft_mcore.training.completing import GenerationTotals, completed_lines
from nested_reft_mcore.training.policy_setup import load_policy, load_policy_tokenizer
from nested_reft_mcore.training.sampling import stop_token_ids
from nested_reft_mcore.training.scoring import scored_lines


def generate_file(options: GenerateOptions, context: ParallelContext) -> None:
    """Complete the prompts of a file as `options` says. Every process calls it.

    The output appears whole or not at all. Rank 0 shows progress and prints a last line: tokens,
    tokens per second and the layers that each pipeline rank ran.

    Raises:
        UserError: a file, a line of the prompts or an option is wrong; nothing was generated.
    """
    check_output_file(options.output)
    model, architecture = _model(options)
    tokenizer = load_policy_tokenizer(model, options.tokenizer_path, architecture)
    sampling = _sampling(options, tokenizer)
    plan = _generation_plan(options, architecture, context)
    if options.speculative and not plan.skipped:
        raise UserError(
            "--speculative: the model with layers skipped is to draft, and nothing is skipped; add "
            "--skip-layers or --skip-ratio"
        )
    prompts = read_prompts(options, tokenizer, architecture)
    policy = load_policy(model, options.parallel, context)
    totals = GenerationTotals()
    lines = completed_lines(policy, prompts, options, sampling, plan, tokenizer, totals)
    write_from_main(options.output, lines, context)
    if context.is_main:
        print(f"{options.output}: {totals.describe()}; skipped: {plan.describe()}", flush=True)


def score_file(options: ScoreOptions, context: ParallelContext) -> None:
    """Write the log-probabilities, at temperature 1, of a file's completions.

    Every process calls it. They come from the forward pass of training, not from cached decoding.
    The output appears whole or not at all.

    Raises:
        UserError: a file, a line of the input or an option is wrong; nothing was scored.
    """
    check_output_file(options.output)
    model, architecture = _model(options)

    @cache
    def get_tokenizer() -> Tokenizer:
        return load_policy_tokenizer(model, options.tokenizer_path, architecture)

    given = read_completions(options.input, get_tokenizer, architecture.vocab_size)
    _check_lengths(given, architecture.max_position_embeddings)
    plan = _parse_plan(options.skip_layers, architecture)
    policy = load_policy(model, options.parallel, context)
    started = time.perf_counter()
    write_from_main(options.output, scored_lines(policy, given, options, plan), context)
    if context.is_main:
        num_tokens = sum(len(completion.token_ids) for completion in given)
        seconds = time.perf_counter() - started
        print(
            f"{options.output}: {len(given)} completions, {num_tokens} tokens in {seconds:.1f} s "
            f"({num_tokens / seconds:,.0f} tokens/s); skipped: {plan.describe()}",
            flush=True,
        )


def read_prompts(
    options: GenerateOptions | ProbeOptions, tokenizer: Tokenizer, architecture: ModelArchitecture
) -> list[Prompt]:
    """The prompts of the file, each with room for its completion.

    Raises:
        UserError: a line cannot be read or leaves no room.
    """
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
            f"{architecture.max_position_embeddings} positions; expected at most "
            f"{architecture.max_position_embeddings - 1}, less the longest prompt"
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
    return SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        greedy=options.greedy,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_token_ids=stop_token_ids(tokenizer, options.stop_tokens),
        stop_strings=options.stop_strings,
        seed=options.seed,
    )


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


def _check_lengths(given: Sequence[GivenCompletion], num_positions: int) -> None:
    for completion in given:
        # The last token is predicted, never read.
        length = len(completion.prompt_token_ids) + len(completion.token_ids) - 1
        if length > num_positions:
            raise UserError(
                f"{completion.source}: prompt and completion have {length + 1} tokens; expected "
                f"at most {num_positions + 1}, for the model has {num_positions} positions"
            )


def _model(options: ModelSource) -> tuple[ModelConfig, ModelArchitecture]:
    model = options.model()
    return model, model_architecture(model)
