"""Hugging Face `config.json` and `ModelArchitecture`, in both directions. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checkpoint_layout import read_checkpoint_architecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ModelConfig

SUPPORTED_MODEL_TYPES = ("llama", "qwen2")
_CLASS_NAMES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
# transformers 5 gives these to an absent key; absent from the dict means "as many as heads".
_DEFAULT_KEY_VALUE_HEADS = {"qwen2": 32}
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "qwen2": 32768}
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_RMS_NORM_EPS = 1e-6


def read_architecture(hf_dir: Path) -> ModelArchitecture:
    """The architecture that `hf_dir/config.json` describes.

    Absent keys mean what transformers 5 takes them to mean. `rope_theta` is read from
    `rope_parameters` (transformers 5) or from the top level (transformers 4).

    Raises:
        UserError: the file is missing or broken, or describes a model that is not supported.
    """
    path = hf_dir / "config.json"
    config = read_json_object(path)
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    _refuse_unsupported(config, path)
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    try:
        architecture = ModelArchitecture.model_validate(_fields(config, model_type))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key}: {first['msg']}, found {first['input']!r}") from error
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
    family = architecture.family
    config: dict[str, Any] = {
        "architectures": [_CLASS_NAMES[family]],
        "model_type": family,
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
        # transformers 5 reads the first, transformers 4 the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": architecture.rotary_base},
        "rope_theta": architecture.rotary_base,
        "tie_word_embeddings": not architecture.untie_embeddings_and_output_weights,
        "initializer_range": architecture.init_method_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False}
    return config


def check_exportable(architecture: ModelArchitecture) -> None:
    """Refuse an architecture that its family's Hugging Face layout cannot hold.

    Raises:
        UserError: the QKV bias is not what the family has.
    """
    if architecture.add_qkv_bias != (architecture.family == "qwen2"):
        raise UserError(
            f"model.architecture: family {architecture.family!r} with "
            f"add_qkv_bias={architecture.add_qkv_bias} has no Hugging Face layout; llama has no "
            "bias, qwen2 always has it"
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


def _fields(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    hidden = config["hidden_size"]
    groups = config.get("num_key_value_heads", _DEFAULT_KEY_VALUE_HEADS.get(model_type))
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
        "max_position_embeddings": config.get(
            "max_position_embeddings", _DEFAULT_MAX_POSITIONS[model_type]
        ),
        "rotary_base": _rope(config).get("rope_theta", config.get("rope_theta"))
        or _DEFAULT_ROPE_THETA,
        "layernorm_epsilon": config.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        "add_qkv_bias": model_type == "qwen2",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "family": model_type,
        "init_method_std": config.get("initializer_range") or 0.02,
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """RoPE options under their name of transformers 5, or of transformers 4."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    rope = _rope(config)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path}: rope_parameters: expected one flat object, found {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(
            f"{path}: RoPE scaling {rope_type!r} is not supported; supported is the plain RoPE "
            "(rope_type 'default')"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act {activation!r} is not supported; supported is 'silu'")
    rotary_factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    slides = config.get("use_sliding_window") or "sliding_attention" in (
        config.get("layer_types") or ()
    )
    refused = {
        "attention_bias": (config.get("attention_bias"), "llama without biases, or qwen2"),
        "mlp_bias": (config.get("mlp_bias"), "an MLP without biases"),
        "partial_rotary_factor": (rotary_factor != 1.0, "RoPE on the whole head"),
        "use_sliding_window": (slides, "full attention in every layer"),
        "quantization_config": (config.get("quantization_config"), "unquantized weights"),
    }
    for key, (is_on, supported) in refused.items():
        if is_on:
            raise UserError(f"{path}: {key} is not supported; supported is {supported}")


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
