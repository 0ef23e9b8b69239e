"""Hugging Face configs in and out, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.config import hf_config, read_architecture

MINIMAL = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 41,
}


def write(directory: Path, **changes) -> Path:
    content = {key: value for key, value in {**MINIMAL, **changes}.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def test_transformers_five_layout_is_read(tmp_path):
    LlamaConfig(
        **{key: value for key, value in MINIMAL.items() if key != "model_type"},
        num_key_value_heads=2,
        head_dim=20,
        rms_norm_eps=1e-5,
        max_position_embeddings=77,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ).save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == ModelArchitecture(
        num_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=80,
        kv_channels=20,
        vocab_size=41,
        max_position_embeddings=77,
        rotary_base=5000.0,
        layernorm_epsilon=1e-5,
        untie_embeddings_and_output_weights=False,
        family="llama",
    )


def test_qwen2_has_bias_and_no_kv_channels_when_usual(tmp_path):
    Qwen2Config(
        **{key: value for key, value in MINIMAL.items() if key != "model_type"},
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    assert architecture.family == "qwen2"
    assert architecture.add_qkv_bias
    assert architecture.untie_embeddings_and_output_weights
    assert architecture.kv_channels is None
    assert architecture.head_dim == 12


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 123.0},
        {"rope_theta": 123.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        {"rope_theta": 123.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_rope_theta_from_either_version(tmp_path, rope):
    write(tmp_path, **rope)
    assert read_architecture(tmp_path).rotary_base == 123.0
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 123.0


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_absent_keys_mean_what_transformers_takes_them_to_mean(tmp_path, model_type):
    heads = 4 if model_type == "llama" else 64
    write(tmp_path, model_type=model_type, num_attention_heads=heads, hidden_size=128)
    ours, theirs = read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.untie_embeddings_and_output_weights == (not theirs.tie_word_embeddings)
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.layernorm_epsilon == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.init_method_std == theirs.initializer_range


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "'mamba'.*llama, qwen2"),
        ({"model_type": "absent"}, "llama, qwen2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "'llama3'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'.*'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_layers.*'many'"),
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads 4"),
        ({"hidden_size": 50}, "4 does not divide hidden_size 50"),
    ],
)
def test_unsupported_configs_are_refused_by_name(tmp_path, changes, named):
    write(tmp_path, **changes)
    with pytest.raises(UserError, match=named) as caught:
        read_architecture(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_architecture(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("untied", [False, True])
def test_export_reads_back_the_same_and_loads_in_transformers(tmp_path, family, untied):
    architecture = ModelArchitecture(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=40,
        kv_channels=8,
        vocab_size=41,
        rotary_base=777.0,
        layernorm_epsilon=1e-5,
        max_position_embeddings=99,
        add_qkv_bias=family == "qwen2",
        untie_embeddings_and_output_weights=untied,
        family=family,
        init_method_std=0.3,
    )
    exported = hf_config(architecture, dtype="bfloat16", eos_token_id=[3, 4])
    (tmp_path / "config.json").write_text(json.dumps(exported))
    assert read_architecture(tmp_path) == architecture
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert theirs.eos_token_id == [3, 4]
    assert theirs.bos_token_id is None
    assert theirs.tie_word_embeddings == (not untied)
    assert str(theirs.dtype) == "torch.bfloat16"


def test_bias_without_a_layout_is_refused():
    architecture = ModelArchitecture(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        ffn_hidden_size=8,
        vocab_size=8,
        add_qkv_bias=True,
    )
    with pytest.raises(UserError, match="'llama' with add_qkv_bias=True"):
        hf_config(architecture)


def test_reading_a_config_does_not_import_torch():
    code = (
        "import sys, nested_reft_mcore.hf.config; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
