"""Rotary embedding options of `config.json`, in both directions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError

_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
_ORIGINAL_LENGTH = "original_max_position_embeddings"


def rope_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`rotary_base` and `rope_scaling` of a `config.json` whose absent keys are filled in.

    Options stand under `rope_parameters` (transformers 5) or under `rope_scaling` and `rope_theta`
    (transformers 4); where both are there, transformers 5 reads the latter, and so does this.

    Raises:
        UserError: they are not understood, or ask for what is not supported.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: {name}: expected one flat object, found {rope!r}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(
            f"{path}: partial_rotary_factor {partial!r} is not supported; supported is RoPE on the "
            "whole head"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(
            f"{path}: RoPE scaling {rope_type!r} is not supported; supported are the plain RoPE "
            "(rope_type 'default') and Llama 3.1's scaling ('llama3')"
        )
    base = rope.get("rope_theta", config["rope_theta"])
    if rope_type == "default":
        return {"rotary_base": base, "rope_scaling": None}
    missing = [key for key in _FACTORS if rope.get(key) is None]
    if missing:
        raise UserError(f"{path}: {name} of rope_type 'llama3': missing {', '.join(missing)}")
    scaling = {key: rope[key] for key in _FACTORS}
    # The order in which transformers looks for the length that the model was first trained on.
    inner = rope.get(_ORIGINAL_LENGTH, config["max_position_embeddings"])
    scaling[_ORIGINAL_LENGTH] = config.get(_ORIGINAL_LENGTH, inner)
    return {"rotary_base": base, "rope_scaling": scaling}


def rope_keys(architecture: ModelArchitecture) -> dict[str, Any]:
    """The keys of `config.json` with which transformers 4 and 5 compute the same frequencies."""
    base, scaling = architecture.rotary_base, architecture.rope_scaling
    if scaling is None:
        parameters = {"rope_type": "default", "rope_theta": base}
        return {"rope_parameters": parameters, "rope_theta": base}
    options = {"rope_type": "llama3", **scaling.model_dump()}
    return {
        "rope_parameters": {**options, "rope_theta": base},
        "rope_scaling": options,
        "rope_theta": base,
    }
