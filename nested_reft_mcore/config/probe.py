"""Options of `nested-reft probe`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import ModelSource, check_input_file, check_model_source

_STANDARD_CONTEXT = 1024


class ProbeOptions(ModelSource):
    """`nested-reft probe`: what each layer's parts cost and save."""

    prompts: str
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`."""
    output: str
    """JSON file that `nested.sensitivity_path` takes."""
    plot: str | None = None
    """PNG file; left out: beside `output`."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many prompts."""
    num_samples: int = Field(default=2, gt=0)
    """Answers that the full model samples for each prompt."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Longest answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling and of the compared distributions: the one to train at."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer, beside the tokenizer's end of sequence."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer."""
    template: Literal["none", "chat"] = "none"
    """`chat` puts each `prompt` through the chat template."""
    kl_budget: float = Field(default=0.1, gt=0)
    """Nats per token that the recommendation may cost."""
    context_length: int | None = Field(default=None, gt=0)
    """Positions attended to where time is measured; left out: 1024, or all that the model has."""
    decode_sequences: int = Field(default=16, gt=0)
    """Sequences decoded together where time is measured."""
    repeats: int = Field(default=7, gt=0)
    """Timed rounds; medians count."""
    random_layers: str = "1,2,4"
    """Numbers of random layers to skip together."""
    draws: int = Field(default=3, gt=0)
    """Plans for each of these numbers and each kind of part."""
    calibration: int = Field(default=12, gt=2)
    """Plans of the law that its prediction of KL is fitted to."""
    held_out: int = Field(default=6, gt=0)
    """Further plans of the law that test the fit."""
    compare: str = ""
    """Budgets at which laws are compared at equal predicted speed-up."""
    batch_size: int = Field(default=8, gt=0)
    """Sequences in one forward pass."""
    seed: int = Field(default=0, ge=0)
    """Key of the sampling and of the drawn plans."""

    @property
    def random_numbers(self) -> tuple[int, ...]:
        """`random_layers` as numbers. UserError if it cannot be read."""
        return tuple(int(n) for n in _numbers("--random-layers", self.random_layers, whole=True))

    @property
    def compare_budgets(self) -> tuple[float, ...]:
        """`compare` as numbers. UserError if it cannot be read."""
        return _numbers("--compare", self.compare, whole=False)

    def timed_context(self, architecture: ModelArchitecture) -> int:
        """Positions that a timed pass attends to."""
        return self.context_length or min(_STANDARD_CONTEXT, architecture.max_position_embeddings)


def check_probe(options: ProbeOptions) -> None:
    """Refuse options that cannot be read, whatever the model, and files that are not there.

    Raises:
        UserError: names the option, what it says and what was expected.
    """
    check_model_source(options)
    check_input_file("--prompts", options.prompts)
    options.compare_budgets  # noqa: B018 - reading it is the check


def check_probe_model(options: ProbeOptions, architecture: ModelArchitecture) -> None:
    """Refuse what the model has no positions or layers for.

    Raises:
        UserError: names the option, what it says and what was expected.
    """
    positions, num_layers = architecture.max_position_embeddings, architecture.num_layers
    if options.timed_context(architecture) > positions:
        raise UserError(
            f"--context-length {options.context_length}: expected at most the model's {positions} "
            "positions"
        )
    for number in options.random_numbers:
        if number > num_layers:
            raise UserError(
                f"--random-layers {options.random_layers}: the model has {num_layers} layers; "
                f"expected numbers from 1 to {num_layers}"
            )


def _numbers(name: str, text: str, *, whole: bool) -> tuple[float, ...]:
    """Positive numbers between commas, ascending."""
    kind = "whole numbers from 1 up" if whole else "positive numbers of nats"
    found: set[float] = set()
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        try:
            number = int(entry) if whole else float(entry)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise UserError(f"{name} {text}: cannot use {entry!r}; expected {kind} between commas")
        found.add(number)
    return tuple(sorted(found))
