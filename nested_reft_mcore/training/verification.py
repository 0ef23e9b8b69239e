"""Whether a checkpoint and a Hugging Face directory are the same model: their logits tell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import read_checkpoint_architecture
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.data.tokenizers import load_tokenizer
from nested_reft_mcore.hf.tokenizer_files import has_tokenizer
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.mcore.agreement import on_main
from nested_reft_mcore.mcore.checkpoint import load_weights
from nested_reft_mcore.mcore.model import build_policy
from nested_reft_mcore.mcore.pipeline import forward_logits

_TEXTS = (
    "Natalia sold 48 clips in April, and half as many in May. How many did she sell altogether?",
    r"Let $f(x) = \frac{1}{2}x^2 - 3x$. Then $f'(x) = x - 3$, so the minimum is at \boxed{3}.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
)
_LONGEST = 64
_SPREAD = 32


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart."""

    largest_difference: float
    """Of any two logits; infinite where one is not finite and the other is."""
    num_tokens: int
    num_sequences: int


def verify(
    checkpoint: Path,
    hf_dir: Path,
    parallel: ParallelConfig,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    tolerance: float,
) -> int:
    """Compare float32 logits of both models and print the largest difference.

    Every process calls it: the checkpoint is loaded in the layout `parallel`, and rank 0 runs
    transformers on the directory. Takes the memory of the model in float32, on rank 0 once more.
    The weights of both are rounded to `dtype`, which was written, so that rounding that was asked
    for does not count as a difference.

    Returns:
        The exit code: 0, or 1 where the difference is above `tolerance`.

    Raises:
        UserError: one of the two cannot be loaded.
    """
    if context.is_main:
        print(
            "verifying: the model runs twice, here and in transformers", file=sys.stderr, flush=True
        )
    architecture = read_checkpoint_architecture(checkpoint)
    model = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    policy = build_policy(architecture, model, parallel, context)
    load_weights(policy, checkpoint)
    for chunk in policy.chunks:
        _round_weights(chunk, dtype)
    sequences = _sequences(hf_dir, architecture)
    ours = [forward_logits(policy, torch.tensor([sequence])) for sequence in sequences]

    def compare() -> Comparison:
        reference = _reference_logits(hf_dir, dtype, sequences)
        return compare_logits([logits[0] for logits in ours if logits is not None], reference)

    found = on_main(compare, context)
    good = found.largest_difference <= tolerance
    if context.is_main:
        print(
            f"verified: {found.num_sequences} sequences, {found.num_tokens} tokens, "
            f"{architecture.vocab_size:,} logits each: largest difference "
            f"{found.largest_difference:.2e} ({'within' if good else 'ABOVE'} {tolerance:.0e})",
            flush=True,
        )
        if not good:
            print(f"error: {checkpoint} is not the model of {hf_dir}", file=sys.stderr, flush=True)
    return ExitCode.OK if good else ExitCode.FAILURE


def compare_logits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Comparison:
    """The largest difference between logits `[positions, vocab]` of the same sequences."""
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        # The same NaN or infinity on both sides is the same model.
        same = (one == other) | (one.isnan() & other.isnan())
        difference = torch.where(same, 0.0, (one - other).abs()).nan_to_num(torch.inf)
        largest = max(largest, float(difference.max()))
    return Comparison(largest, sum(len(one) for one in ours), len(ours))


def _sequences(hf_dir: Path, architecture: ModelArchitecture) -> list[list[int]]:
    """Token ids spread over the whole vocabulary and, where there is a tokenizer, some texts."""
    length = min(_LONGEST, architecture.max_position_embeddings)
    last = architecture.vocab_size - 1
    spread = [last * i // (_SPREAD - 1) for i in range(_SPREAD)]
    sequences = [spread[:length]]
    if has_tokenizer(hf_dir):
        tokenizer = load_tokenizer(hf_dir)
        sequences += [list(tokenizer.encode(text))[:length] for text in _TEXTS]
    return [sequence for sequence in sequences if sequence]


def _reference_logits(
    hf_dir: Path, dtype: torch.dtype, sequences: Sequence[Sequence[int]]
) -> list[Tensor]:
    """What transformers computes in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(hf_dir), dtype=torch.float32, local_files_only=True
    ).eval()
    _round_weights(model, dtype)
    with torch.no_grad():
        return [model(torch.tensor([list(sequence)])).logits[0] for sequence in sequences]


def _round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
