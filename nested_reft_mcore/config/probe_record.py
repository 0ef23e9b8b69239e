"""What `nested-reft probe` writes and the law `sensitivity` reads: one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.config.schema import NestedConfig

_MARGIN = 1.5
"""A budget may exceed the largest KL that was measured by this factor."""
PROBE_VERSION = 1
"""Of the file's form; another one is refused."""
PartName = Literal["layer", "attention", "mlp"]


class ProbedModel(Section):
    """The model that was probed."""

    source: str
    """Directory that it came from."""
    dtype: str
    """Type of its weights."""
    architecture: ModelArchitecture
    """Its shape."""


class ProbedAnswers(Section):
    """The answers at whose tokens the policies were compared."""

    prompts: str
    """File of the prompts."""
    num_prompts: int = Field(gt=0)
    """Prompts taken from it."""
    num_sequences: int = Field(gt=0)
    """Answers that the full model sampled."""
    num_tokens: int = Field(gt=0)
    """Their tokens; every KL is a mean over them."""
    max_new_tokens: int = Field(gt=0)
    """Longest answer."""
    temperature: float = Field(gt=0)
    """Of sampling and of both distributions."""
    seed: int = Field(ge=0)
    """Key of the sampling and of the drawn plans."""


class Divergence(Section):
    """How far a nested policy is from the full one."""

    kl: float
    """Exact KL(nested || full) over the vocabulary, nats, mean over response tokens."""
    kl_error: float = Field(ge=0)
    """Standard error of that mean, answers taken as independent."""
    overlap: float
    """Mean over response tokens of the sum over the vocabulary of min(nested, full)."""


class ProbedPart(Divergence):
    """One part of one layer, skipped alone."""

    layer: int = Field(ge=0)
    """0-based global layer."""
    part: PartName
    """What of it."""
    seconds: float
    """What a decode pass takes less without it."""


NOISE_LIMIT = 0.2
"""Attention and MLP differ by about as much: beyond it the times cannot rank them."""


class DecodeTimes(Section):
    """A decode pass, one token for each of so many sequences; medians, seconds."""

    context_length: int = Field(gt=0)
    """Positions that each sequence attends to."""
    num_sequences: int = Field(gt=0)
    """Sequences that are decoded together."""
    step: float = Field(gt=0)
    """The full model, all stages one after the other."""
    layer: float = Field(gt=0)
    """One whole layer."""
    attention: float
    """The attention of one layer."""
    mlp: float
    """The MLP of one layer."""
    head: float = Field(ge=0)
    """What is left on the last stage: final norm, logits, drawing a token."""
    tensor_model_parallel_size: int = Field(gt=0)
    """Processes that shared a layer when it was measured."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """Standard error of what all layers take, as a share of it; 1: nothing was resolved."""

    @property
    def is_noise(self) -> bool:
        """Whether scatter hides what the parts take."""
        return self.noise > NOISE_LIMIT


class FittedInteraction(Section):
    """KL of several parts = scale * (sum of their own) ** exponent."""

    scale: float = Field(gt=0)
    """Factor of the fit."""
    exponent: float = Field(gt=0)
    """Power of the fit."""
    spread: float = Field(ge=0)
    """Standard deviation of log(measured / fitted)."""
    largest_kl: float = Field(gt=0)
    """Largest KL among the measurements, nats per token: farther up nothing is known."""


class ProbedPlan(Divergence):
    """Several parts skipped together."""

    kind: Literal["random", "calibration", "held_out"]
    """k random layers; a plan that the fit was made from; or one that tests the fit."""
    part: PartName | None = None
    """Of random layers: what of them."""
    num_skipped: int = Field(ge=0)
    """Entries of the plan."""
    skipped: str
    """The plan, as in `3,5.attention`."""
    total_kl: float
    """Sum of its parts' own KL."""
    predicted_kl: float
    """By the fitted interaction."""
    speedup: float = Field(gt=0)
    """Of a decode pass, from the measured times of parts; the slowest stage counts."""


class Advice(Section):
    """How the laws `uniform` and `stage_balanced` may skip one kind of part within the budget."""

    part: PartName
    """`nested.part`."""
    border_layers: int = Field(ge=0)
    """`nested.border_layers`."""
    protected_layers: tuple[int, ...]
    """`nested.protected_layers`: further sensitive ones."""
    num_skipped: int = Field(ge=0)
    """`nested.num_skipped`: the largest number whose expected KL is within the budget."""
    predicted_kl: float
    """Of so many random layers."""
    speedup: float = Field(gt=0)
    """Of a decode pass where stages share the saving evenly."""


class LawAdvice(Section):
    """What the law `sensitivity` makes of the budget, on the stages that the probe ran on."""

    kl_budget: float = Field(gt=0)
    """`nested.kl_budget`."""
    num_plans: int = Field(ge=0)
    """Plans that it draws from; 0 where the budget buys nothing."""
    speedup: float = Field(gt=0)
    """Mean over drawn plans, of a decode pass."""
    predicted_kl: float
    """Mean over drawn plans."""
    never_skipped: tuple[int, ...]
    """Layers of which every part alone costs more than the budget."""


class ComparedLaw(Divergence):
    """A law's plans, measured, where it saves about as much time as `sensitivity` does."""

    law: str
    """Its name, with the part that it skips."""
    kl_budget: float = Field(gt=0)
    """Budget of `sensitivity` that it is compared at."""
    num_skipped: float
    """Entries of a plan, mean."""
    num_measured: int = Field(gt=0)
    """Plans that were measured; `kl_error` is over them."""
    speedup: float = Field(gt=0)
    """Predicted, of a decode pass; mean."""


class ProbeRecord(Section):
    """The sensitivity of a model, layer by layer and part by part."""

    kind: Literal["nested_reft_probe"] = "nested_reft_probe"
    """What the file is."""
    version: int = PROBE_VERSION
    """Of its form."""
    model: ProbedModel
    """What was probed."""
    answers: ProbedAnswers
    """Where the policies were compared."""
    parts: tuple[ProbedPart, ...] = Field(min_length=1)
    """Every part that was skipped alone."""
    times: DecodeTimes
    """Where the seconds come from."""
    interaction: FittedInteraction
    """How parts add up."""
    plans: tuple[ProbedPlan, ...] = ()
    """Everything that was skipped together."""
    advice: tuple[Advice, ...] = ()
    """For laws that skip a number of layers."""
    law: LawAdvice
    """For the law `sensitivity`."""
    comparison: tuple[ComparedLaw, ...] = ()
    """Of laws, if it was asked for."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Machine, packages and commit."""

    @property
    def held_out_ratios(self) -> list[float]:
        """Measured / predicted KL of the plans that test the fit, where both are positive."""
        held_out = [plan for plan in self.plans if plan.kind == "held_out"]
        return [p.kl / p.predicted_kl for p in held_out if min(p.kl, p.predicted_kl) > 0]


def read_probe(path: str | Path, key: str = "nested.sensitivity_path") -> ProbeRecord:
    """Read what `nested-reft probe` wrote.

    Raises:
        UserError: the file is missing, is no JSON, or lacks something; names `key` and the file.
    """
    source = f"{key}: {path}"
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{source} does not exist (taken from {Path.cwd()}); expected the JSON file that "
            "`nested-reft probe --output` writes"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{source}: cannot be read as JSON ({error}); expected what `nested-reft probe` writes"
        ) from None
    record = cast(dict[str, Any], data) if isinstance(data, dict) else {}
    if record.get("kind") != "nested_reft_probe":
        raise UserError(f"{source}: is no probe; expected what `nested-reft probe` writes")
    if record.get("version") != PROBE_VERSION:
        raise UserError(
            f"{source}: `version` is {record.get('version')!r}, expected {PROBE_VERSION}; "
            "probe the model again"
        )
    return section_from_dict(ProbeRecord, record, source)


def check_probed_model(
    record: ProbeRecord, architecture: ModelArchitecture, key: str, path: str
) -> None:
    """Refuse the probe of a model of another shape.

    Raises:
        UserError: names the first difference.
    """
    probed = record.model.architecture
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    for name in (*sizes, "num_query_groups", "vocab_size"):
        found, expected = getattr(probed, name), getattr(architecture, name)
        if found != expected:
            raise UserError(
                f"{key}: {path}: `model.architecture.{name}` is {found}, but the model has "
                f"{expected}; expected a probe of this model or of one that it was trained from"
            )
    for part in record.parts:
        if part.layer >= probed.num_layers:
            raise UserError(
                f"{key}: {path}: `parts` names layer {part.layer} of {probed.num_layers}; "
                f"expected 0 to {probed.num_layers - 1}"
            )


def read_sensitivity(nested: NestedConfig, architecture: ModelArchitecture) -> ProbeRecord:
    """The probe that the law `sensitivity` draws from, checked against model and budget.

    Raises:
        UserError: it is missing, broken, of another model, or measured far smaller KLs only.
    """
    assert nested.sensitivity_path is not None, "checked with the configuration"
    assert nested.kl_budget is not None, "checked with the configuration"
    record = read_probe(nested.sensitivity_path)
    check_probed_model(record, architecture, "nested.sensitivity_path", nested.sensitivity_path)
    most = record.interaction.largest_kl * _MARGIN
    if nested.kl_budget > most:
        raise UserError(
            f"nested.kl_budget={nested.kl_budget:g}: {nested.sensitivity_path} measured plans of "
            f"at most {record.interaction.largest_kl:.3g} nats per token; expected at most "
            f"{most:.3g}, or a probe with a --kl-budget like it"
        )
    return record
