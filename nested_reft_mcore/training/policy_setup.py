"""A policy with its weights and tokenizer, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import resolve_checkpoint
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.data.prompt import Prompt
from nested_reft_mcore.data.tokenizers import Tokenizer, load_tokenizer
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.hf.tokenizer_files import checkpoint_tokenizer
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.checkpoint import load_weights
from nested_reft_mcore.mcore.hf_weights import load_hf_weights
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.weights import initialize_weights


def load_policy(
    model: ModelConfig, parallel: ParallelConfig, context: ParallelContext, seed: int = 0
) -> Policy:
    """Build the policy and fill it; every process calls it and reads its own share.

    Raises:
        UserError: the directory is missing, broken, or holds something else.
    """
    policy = build_policy(model_architecture(model), model, parallel, context)
    if model.hf_path is not None:
        load_hf_weights(policy, Path(model.hf_path))
    elif model.checkpoint is not None:
        load_weights(policy, model.checkpoint)
    else:
        initialize_weights(policy, seed)
    return policy


def find_tokenizer(model: ModelConfig, tokenizer_path: str | None) -> Path:
    """Where the tokenizer is: as given, else the model's own.

    Raises:
        UserError: the model has none.
    """
    if tokenizer_path is not None:
        return Path(tokenizer_path)
    if model.hf_path is not None:
        return Path(model.hf_path)
    if model.checkpoint is not None:
        found = checkpoint_tokenizer(resolve_checkpoint(model.checkpoint))
        if found is not None:
            return found
        raise UserError(
            f"{model.checkpoint}: has no tokenizer; give one by data.tokenizer_path "
            "(--tokenizer on the command line)"
        )
    raise UserError("data.tokenizer_path is missing: a model with fresh weights has no tokenizer")


def load_policy_tokenizer(
    model: ModelConfig, tokenizer_path: str | None, architecture: ModelArchitecture
) -> Tokenizer:
    """The tokenizer, checked against the policy's vocabulary.

    Raises:
        UserError: there is none, or it has ids that the policy lacks.
    """
    path = find_tokenizer(model, tokenizer_path)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} tokens, the model's vocab_size is "
            f"{architecture.vocab_size}; expected at most that many"
        )
    return tokenizer


def check_room(
    prompts: Sequence[Prompt], max_new_tokens: int, architecture: ModelArchitecture
) -> None:
    """Refuse prompts that leave no room for their completions.

    Raises:
        UserError: names the line and the numbers.
    """
    room = architecture.max_position_embeddings - max_new_tokens
    for prompt in prompts:
        if len(prompt.token_ids) > room:
            raise UserError(
                f"{prompt.source}: the prompt has {len(prompt.token_ids)} tokens; expected at most "
                f"{room}, the model's {architecture.max_position_embeddings} positions less "
                f"rollout.max_new_tokens={max_new_tokens}; data.max_prompt_length drops longer ones"
            )
