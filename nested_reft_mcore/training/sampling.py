"""Sampling parameters of training rollouts."""

from __future__ import annotations

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.rollout.types import SamplingParams


def stop_token_ids(tokenizer: Tokenizer, extra: tuple[str, ...]) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's ends of sequence and `extra` tokens.

    Raises:
        UserError: the tokenizer has no such token.
    """
    ids = set(tokenizer.eos_token_ids)
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
    """The full distribution at the config's temperature, keyed by (seed, step)."""
    return SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        stop_token_ids=stop_token_ids(tokenizer, config.rollout.stop_tokens),
        seed=config.seed,
        step=step,
    )
