"""Hugging Face `config.json` and `ModelArchitecture`, in both directions. Imports no torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import read_checkpoint_architecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ModelConfig
from nested_reft_mcore.hf.families import FAMILIES
from nested_reft_mcore.hf.family import Family
from nested_reft_mcore.hf.rope import rope_fields, rope_keys

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_NAMES = re.compile("moe|mixtral")


def read_architecture(hf_dir: Path) -> ModelArchitecture:
    """The architecture that `hf_dir/config.json` describes.

    Absent keys mean what transformers 5 takes them to mean.

    Raises:
        UserError: the file is missing or broken, or describes a model that is not supported.
    """
    path = hf_dir / "config.json"
    found = read_json_object(path)
    family = _family(found, path)
    missing = [key for key in _REQUIRED if found.get(key) is None]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    config = {**family.defaults, **found}
    _refuse_unsupported(config, path)
    try:
        architecture = ModelArchitecture.model_validate(_fields(config, family, path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key}: {first['msg']}, found {first['input']!r}") from error
    _refuse_by_family(family, config, found, path)
    _check_heads(architecture, path)
    return architecture


def model_architecture(model: ModelConfig) -> ModelArchitecture:
    """The shape of a configuration's model, wherever it comes from.

    Raises:
        UserError: the directory that should tell it is missing, broken or of an unknown type.
    """
    if model.architecture is not None:
        return model.architecture
    if model.hf_path is not None:
        return read_architecture(Path(model.hf_path))
    return read_checkpoint_architecture(str(model.checkpoint))


def model_source(model: ModelConfig) -> str:
    """Where a configuration's model comes from, for messages."""
    return model.hf_path or model.checkpoint or "model.architecture"


def hf_config(
    architecture: ModelArchitecture,
    *,
    dtype: str = "float32",
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """Content of the `config.json` with which transformers 4 and 5 load an exported model.

    `dtype` is the type of the exported weights. The ids of special tokens are written even when
    they are None, because an absent key means 1 and 2 to Llama.

    Raises:
        UserError: the family of the architecture cannot hold its weights.
    """
    check_exportable(architecture)
    family = FAMILIES[architecture.family]
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.layernorm_epsilon,
        **rope_keys(architecture),
        "tie_word_embeddings": not architecture.untie_embeddings_and_output_weights,
        "initializer_range": architecture.init_method_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        **family.extra_keys,
    }


def check_exportable(architecture: ModelArchitecture) -> None:
    """Refuse an architecture that its family's Hugging Face layout cannot hold.

    Raises:
        UserError: QKV bias, query and key norms or the width are not what the family has.
    """
    family = FAMILIES[architecture.family]
    for name in ("add_qkv_bias", "qk_layernorm"):
        found, expected = getattr(architecture, name), getattr(family, name)
        if found != expected:
            raise UserError(
                f"model.architecture: family {family.model_type!r} with {name}={found} has no "
                f"Hugging Face layout; this family always has {name}={expected}"
            )
    heads, hidden = architecture.num_attention_heads, architecture.hidden_size
    if family.heads_divide_hidden and hidden % heads:
        raise UserError(
            f"model.architecture: family {family.model_type!r} with num_attention_heads={heads} "
            f"and hidden_size={hidden}: transformers loads this family only where the first "
            "divides the second"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a Hugging Face model directory has it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _family(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a `config.json`, by its `model_type`."""
    model_type = config.get("model_type")
    experts = [key for key in _EXPERT_KEYS if config.get(key)]
    if experts or _EXPERT_NAMES.search(str(model_type)):
        found = ", ".join([f"model_type {model_type!r}"] + [f"{k} {config[k]!r}" for k in experts])
        raise UserError(
            f"{path}: a mixture of experts is not supported ({found}); supported are the dense "
            f"families {', '.join(FAMILIES)}"
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _fields(config: Mapping[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """The fields of `ModelArchitecture`; `config` has its absent keys filled in."""
    heads = config["num_attention_heads"]
    hidden = config["hidden_size"]
    groups = config.get("num_key_value_heads")
    head_dim = config.get("head_dim")
    is_usual = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    if is_usual and head_dim is not None and head_dim * heads == hidden:
        head_dim = None
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads if groups is None else groups,
        "ffn_hidden_size": config["intermediate_size"],
        "kv_channels": head_dim,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        **rope_fields(config, path),
        "layernorm_epsilon": config["rms_norm_eps"],
        "add_qkv_bias": family.add_qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "family": family.model_type,
        # A spread of zero says nothing that fresh weights could use.
        "init_method_std": config["initializer_range"] or family.defaults["initializer_range"],
    }


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    """What no family computes here."""
    activation = config.get("hidden_act", "silu")
    kinds = config.get("layer_types") or []
    kinds = kinds if isinstance(kinds, list) else [kinds]
    other = next((kind for kind in kinds if kind != "full_attention"), None)
    quantization = config.get("quantization_config")
    refused = (
        (f"hidden_act {activation!r}", activation not in ("silu", "swish"), "'silu'"),
        ("mlp_bias", config.get("mlp_bias"), "an MLP without biases"),
        (f"layer_types with {other!r}", other, "'full_attention' in every layer"),
        (f"quantization_config {quantization!r}", quantization, "unquantized weights"),
    )
    for found, is_on, supported in refused:
        if is_on:
            raise UserError(f"{path}: {found} is not supported; supported is {supported}")


def _refuse_by_family(
    family: Family, config: Mapping[str, Any], found: Mapping[str, Any], path: Path
) -> None:
    """What this family does not compute here."""
    for refusal in family.refusals:
        if refusal.applies(config):
            absent = "" if refusal.key in found else " (what an absent key means)"
            raise UserError(
                f"{path}: {refusal.key} {config.get(refusal.key)!r}{absent} is not supported for "
                f"{family.model_type}; supported is {refusal.supported}"
            )


def _check_heads(architecture: ModelArchitecture, path: Path) -> None:
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    if heads % groups:
        raise UserError(
            f"{path}: num_key_value_heads {groups} does not divide num_attention_heads {heads}"
        )
    if architecture.kv_channels is None and architecture.hidden_size % heads:
        raise UserError(
            f"{path}: num_attention_heads {heads} does not divide hidden_size "
            f"{architecture.hidden_size}, and there is no head_dim"
        )
    if architecture.head_dim % 2:
        raise UserError(
            f"{path}: heads of size {architecture.head_dim} are not supported; rotary embeddings "
            "need an even size"
        )
