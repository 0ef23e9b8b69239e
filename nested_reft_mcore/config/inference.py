"""Options of the commands that work on files: generate, score and convert."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class ModelSource(Section):
    """Which model to use and how to spread it: exactly one of `hf` and `checkpoint`."""

    hf: str | None = None
    """Hugging Face directory: architecture, weights and tokenizer."""
    checkpoint: str | None = None
    """Checkpoint directory, or a root of some with a `latest` file."""
    tokenizer_path: str | None = None
    """Tokenizer directory or sentencepiece `.model` file; default: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over processes."""

    def model(self) -> ModelConfig:
        """The model, as a configuration file would name it."""
        return ModelConfig(hf_path=self.hf, checkpoint=self.checkpoint, dtype=self.dtype)


class GenerateOptions(ModelSource):
    """`nested-reft generate`: completions of the prompts in a file."""

    prompts: str
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`."""
    output: str
    """JSON lines with `prompt_token_ids`, `token_ids`, `text` and `finish_reason`."""
    logprobs: bool = False
    """Also write `logprobs`, one for each of `token_ids`, of the distribution sampled from."""
    skip_layers: str | None = None
    """What not to run: global 0-based layers and parts, as in `3,5.attention,7.mlp`."""
    skip_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Draw round(skip_ratio * num_layers) layers to skip from the seed."""
    law: Literal["uniform", "stage_balanced"] = "stage_balanced"
    """How `skip_ratio` draws layers."""
    border_layers: int = Field(default=1, ge=0)
    """Layers at either end that `skip_ratio` never skips."""
    greedy: bool = False
    """Take the likeliest token instead of sampling."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_k: int | None = Field(default=None, gt=0)
    """Keep the k likeliest tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the smallest set of tokens with this mass."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Longest completion."""
    num_samples: int = Field(default=1, gt=0)
    """Completions of each prompt."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, beside the tokenizer's end of sequence."""
    template: Literal["none", "chat"] = "none"
    """`chat` puts each `prompt` through the chat template; `messages` always go through it."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a completion as soon as it contains one."""
    speculative: bool = False
    """The model with layers skipped drafts and the full one verifies: its very distribution."""
    max_slots: int | None = Field(default=None, gt=0)
    """Sequences decoded at the same time; left out: what memory allows, 256 at most."""
    kv_cache_gb: float | None = Field(default=None, gt=0)
    """Memory for keys and values on each process, in 10^9 bytes; left out: half of what is free."""
    seed: int = Field(default=0, ge=0)
    """Key of the sampling and of the drawn layers."""


class ScoreOptions(ModelSource):
    """`nested-reft score`: log-probabilities of given completions."""

    input: str
    """JSON lines with `prompt_token_ids` and `token_ids`, or the texts `prompt` and `text`."""
    output: str
    """JSON lines with `logprobs`, one for each of `token_ids`, at temperature 1."""
    skip_layers: str | None = None
    """What not to run, as in `3,5.attention,7.mlp`; the full model if left out."""
    batch_size: int = Field(default=8, gt=0)
    """Sequences in one forward pass."""


class ConvertOptions(Section):
    """What both directions of `nested-reft convert` have in common."""

    output: str
    """Directory to write; appears whole or not at all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the written weights; `auto` keeps the type that they have (float16 becomes
    float32)."""
    force: bool = False
    """Replace what an earlier conversion has written there."""
    verify: bool = False
    """Compare float32 logits of both models afterwards."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest difference of two logits that `verify` accepts. Sums in another order differ by up
    to 1e-4, weights in the wrong place by more than 1e-1."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout that pieces are cut for and that `verify` runs, and processes of a bare start."""


class HfToMcoreOptions(ConvertOptions):
    """`nested-reft convert hf-to-mcore`: a Hugging Face directory becomes a checkpoint."""

    hf: str
    """Hugging Face directory to read."""
    allow_nonfinite: bool = False
    """Only warn of NaN and infinity among the weights."""


class McoreToHfOptions(ConvertOptions):
    """`nested-reft convert mcore-to-hf`: a checkpoint becomes a Hugging Face directory."""

    checkpoint: str
    """Checkpoint directory, or a root of some with a `latest` file."""
    tokenizer_path: str | None = None
    """Tokenizer to put beside the weights; default: the one in the checkpoint, if any."""
    max_shard_size: str = "5GB"
    """A file of weights holds at most so many bytes, or a single tensor: `5GB`, `500MB`, `20KB`."""

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes. UserError if it cannot be read."""
        return parse_size("--max-shard-size", self.max_shard_size)


def parse_size(name: str, text: str) -> int:
    """A number of bytes from `5GB`, `1.5MB`, `20KB` (powers of 1000, as transformers has them).

    Raises:
        UserError: names the option and what was expected.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip(), re.IGNORECASE)
    size = 0
    if found:
        size = int(float(found.group(1)) * _UNITS[found.group(2).upper()])
    if size <= 0:
        raise UserError(f"{name} {text}: expected a size such as 5GB, 500MB or 20KB")
    return size


def check_model_source(options: ModelSource) -> None:
    """Refuse a model with no origin or two.

    Raises:
        UserError: names what is there.
    """
    if (options.hf is None) == (options.checkpoint is None):
        found = "neither" if options.hf is None else "both"
        raise UserError(f"expected exactly one of --hf DIR and --checkpoint DIR, got {found}")


def check_generate(options: GenerateOptions) -> None:
    """Refuse options of `generate` that contradict each other, and files that are not there.

    Raises:
        UserError: names the options and what they say.
    """
    check_model_source(options)
    check_input_file("--prompts", options.prompts)
    if options.skip_layers is not None and options.skip_ratio is not None:
        raise UserError("--skip-layers and --skip-ratio are both set; set one of them")
    if options.greedy and options.num_samples > 1:
        raise UserError(
            f"--greedy with --num-samples {options.num_samples}: all completions of a prompt "
            "would be the same; leave one of them out"
        )
    if options.greedy and (options.top_k is not None or options.top_p is not None):
        raise UserError("--greedy takes the likeliest token; leave --top-k and --top-p out")


def check_score(options: ScoreOptions) -> None:
    """Refuse options of `score` that contradict each other, and files that are not there.

    Raises:
        UserError: names the options and what they say.
    """
    check_model_source(options)
    check_input_file("--input", options.input)


def check_input_file(name: str, path: str) -> None:
    """Refuse a path that is no file.

    Raises:
        UserError: names the option or key and the path.
    """
    if not Path(path).is_file():
        found = "is a directory" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{name} {path}: {found}; expected a file")
