"""Options of `nested-reft bench`, and what is wrong with them before anything is measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from pydantic import Field

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import ModelSource
from nested_reft_mcore.config.schema import ModelConfig

PartName = Literal["layer", "attention", "mlp"]
PeerName = Literal["transformers", "vllm"]

STANDARD_CONTEXTS = (128, 1024, 4096)
"""Contexts that are measured if none are asked for, as far as the model has positions."""

_SHAPE_KEYS = {
    "hidden": "hidden_size",
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
    "ffn": "ffn_hidden_size",
    "vocab": "vocab_size",
}
_SHAPE_EXAMPLE = "hidden=256,layers=12,heads=8,groups=2,ffn=704,vocab=8192"


class BenchRolloutOptions(ModelSource):
    """`nested-reft bench rollout`: how fast completions are generated, and what skipping gains."""

    shape: str | None = None
    """Random weights in Qwen2's layout instead of a model: `hidden=256,layers=12,...`."""
    output: str | None = None
    """JSON file for every single run."""
    prompts: int = Field(default=16, gt=0)
    """Sequences that are generated together, one for each prompt."""
    prompt_tokens: int = Field(default=64, gt=0)
    """Length of each prompt."""
    new_tokens: int = Field(default=64, gt=1)
    """Tokens that are generated for each prompt; nothing stops earlier."""
    skip: str = "0,5,10,15,20,25,50"
    """Percentages of the layers to skip."""
    parts: str = "layer,attention,mlp"
    """What of a layer is skipped, one after the other."""
    contexts: str | None = None
    """Lengths at which decoding alone is measured; `none`: not at all."""
    context_sequences: int = Field(default=4, gt=0)
    """Sequences decoded together at each of `contexts`; they share their prompt."""
    context_new_tokens: int = Field(default=24, gt=8)
    """Tokens decoded for each of them."""
    law: Literal["uniform", "stage_balanced"] = "stage_balanced"
    """How the skipped layers are drawn."""
    border_layers: int = Field(default=1, ge=0)
    """Layers at either end that are never skipped."""
    repeats: int = Field(default=5, gt=0)
    """Rounds; each measures every case once. Contexts take half as many, rounded up."""
    peers: str = ""
    """Who else generates from the same weights: `transformers`, `vllm`."""
    vllm_python: str | None = None
    """Interpreter of an environment that has vLLM."""
    seed: int = Field(default=0, ge=0)
    """Key of the prompts, the sampling, the drawn layers and random weights."""

    def model(self) -> ModelConfig:
        """The model, as a configuration file would name it."""
        if self.shape is None:
            return super().model()
        return ModelConfig(architecture=parse_shape(self.shape), dtype=self.dtype)

    @property
    def percentages(self) -> tuple[float, ...]:
        """`skip` as numbers, ascending, 0 among them. UserError if it cannot be read."""
        found = {_percentage(entry, self.skip) for entry in _entries(self.skip)}
        return tuple(sorted(found | {0.0}))

    @property
    def part_names(self) -> tuple[PartName, ...]:
        """`parts` as names. UserError for an unknown one, or for none."""
        found = _names("--parts", self.parts, get_args(PartName))
        if not found:
            raise UserError(f"--parts: is empty; expected some of {', '.join(get_args(PartName))}")
        return cast(tuple[PartName, ...], found)

    @property
    def peer_names(self) -> tuple[PeerName, ...]:
        """`peers` as names. UserError for an unknown one."""
        return cast(tuple[PeerName, ...], _names("--peers", self.peers, get_args(PeerName)))

    def context_lengths(self, max_length: int) -> tuple[int, ...]:
        """`contexts` as numbers, none above `max_length`. UserError if it cannot be read."""
        if self.contexts is None:
            return tuple(length for length in STANDARD_CONTEXTS if length <= max_length)
        if self.contexts.strip() == "none":
            return ()
        least = self.context_new_tokens + 1
        lengths = {_whole_number("--contexts", text) for text in _entries(self.contexts)}
        for length in sorted(lengths):
            if not least <= length <= max_length:
                raise UserError(
                    f"--contexts {length}: expected at least {least} (the new tokens and a prompt) "
                    f"and at most the model's {max_length} positions"
                )
        return tuple(sorted(lengths))


def check_bench_rollout(options: BenchRolloutOptions) -> None:
    """Refuse options that cannot be read or contradict each other, whatever the model.

    Raises:
        UserError: names the option, what it says and what was expected.
    """
    given = [name for name in ("hf", "checkpoint", "shape") if getattr(options, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise UserError(
            f"expected exactly one of --hf DIR, --checkpoint DIR and --shape SIZES, got {found}"
        )
    _ = options.percentages, options.part_names
    if "vllm" in options.peer_names:
        if options.vllm_python is None:
            raise UserError(
                "--peers vllm: needs --vllm-python PATH, an interpreter of an environment that has "
                "vLLM; it does not share one with this package"
            )
    elif options.vllm_python is not None:
        raise UserError("--vllm-python is set, but --peers does not name vllm")
    if options.vllm_python is not None and shutil.which(options.vllm_python) is None:
        raise UserError(f"--vllm-python {options.vllm_python}: there is no such program")
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: its directory does not exist")


def check_bench_model(options: BenchRolloutOptions, architecture: ModelArchitecture) -> None:
    """Refuse lengths that the model has no positions for, and skipping more than may be skipped.

    Raises:
        UserError: names the option, what it says and what would fit.
    """
    room = architecture.max_position_embeddings
    length = options.prompt_tokens + options.new_tokens
    if length > room:
        raise UserError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} make "
            f"{length} positions; expected at most the model's {room}"
        )
    options.context_lengths(room)
    num_layers = architecture.num_layers
    valid = max(0, num_layers - 2 * options.border_layers)
    for percentage in options.percentages:
        wanted = layers_of_percentage(percentage, num_layers)
        if wanted > valid:
            raise UserError(
                f"--skip {percentage:g}: is {wanted} of {num_layers} layers; with --border-layers "
                f"{options.border_layers} at most {valid} may be skipped"
            )


def layers_of_percentage(percentage: float, num_layers: int) -> int:
    """So much of the layers, to the nearest whole one, halves up."""
    return math.floor(percentage * num_layers / 100 + 0.5 + 1e-9)


def parse_shape(text: str) -> ModelArchitecture:
    """An architecture in Qwen2's layout from `hidden=256,layers=12,heads=8,groups=2,...`.

    Raises:
        UserError: a size is missing, unknown, no positive number, or does not divide another.
    """
    sizes: dict[str, int] = {}
    for entry in _entries(text):
        key, _, value = (part.strip() for part in entry.partition("="))
        if key not in _SHAPE_KEYS:
            raise UserError(
                f"--shape {entry}: expected one of {', '.join(_SHAPE_KEYS)}, as in {_SHAPE_EXAMPLE}"
            )
        sizes[key] = _whole_number(f"--shape {key}", value)
    missing = [key for key in _SHAPE_KEYS if key not in sizes]
    if missing:
        raise UserError(f"--shape: missing {', '.join(missing)}, as in {_SHAPE_EXAMPLE}")
    for whole, part in (("hidden", "heads"), ("heads", "groups")):
        if sizes[whole] % sizes[part]:
            raise UserError(f"--shape: {part}={sizes[part]} does not divide {whole}={sizes[whole]}")
    if sizes["hidden"] // sizes["heads"] % 2:
        raise UserError(f"--shape: heads of {sizes['hidden'] // sizes['heads']}; expected even")
    return ModelArchitecture.model_validate(
        {_SHAPE_KEYS[key]: size for key, size in sizes.items()}
        | {"add_qkv_bias": True, "family": "qwen2"}
    )


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def _percentage(entry: str, text: str) -> float:
    try:
        found = float(entry)
    except ValueError:
        found = math.nan
    if not 0 <= found < 100:
        raise UserError(
            f"--skip {text}: found {entry!r}; expected percentages from 0 to below 100, as in "
            "0,10,25"
        )
    return found


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name} {text}: expected a whole number from 1 up")
    return int(text)


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    found = _entries(text)
    for name in found:
        if name not in known:
            raise UserError(f"{option} {name}: expected some of {', '.join(known)}")
    return tuple(dict.fromkeys(found))
