"""How completions are generated: the engine, and the parameters of sampling."""

from __future__ import annotations

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import GenerateOptions
from nested_reft_mcore.config.schema import Config, RolloutConfig
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.types import SamplingParams


def build_engine(options: RolloutConfig) -> RolloutEngine:
    """The engine of a run."""
    return RolloutEngine(
        options.max_slots,
        kv_cache_bytes=cache_bytes(options),
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_draft_tokens=options.max_draft_tokens,
    )


def cache_bytes(options: RolloutConfig | GenerateOptions) -> int | None:
    """`kv_cache_gb` in bytes."""
    return None if options.kv_cache_gb is None else int(options.kv_cache_gb * 1e9)


def stop_token_ids(
    tokenizer: Tokenizer, extra: tuple[str, ...], ignore_eos: bool = False
) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's ends of sequence and `extra` tokens.

    With `ignore_eos` the `extra` tokens alone, as vLLM's option of this name has it.

    Raises:
        UserError: the tokenizer has no such token.
    """
    ids = set() if ignore_eos else set(tokenizer.eos_token_ids)
    for token in extra:
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"stop token {token!r} is not in the tokenizer's vocabulary; expected the exact "
                "spelling of one token"
            )
        ids.add(token_id)
    return tuple(sorted(ids))


def training_sampling(config: Config, tokenizer: Tokenizer, step: int) -> SamplingParams:
    """The full distribution at the config's temperature, keyed by (seed, step).

    Raises:
        UserError: a stop token is none.
    """
    options = config.rollout
    return SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        stop_token_ids=stop_token_ids(tokenizer, options.stop_tokens, options.ignore_eos),
        stop_strings=config.rollout.stop_strings,
        seed=config.seed,
        step=step,
    )
