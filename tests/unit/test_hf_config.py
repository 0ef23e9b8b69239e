"""Hugging Face configs in and out, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nested_reft_mcore.config.architecture import ModelArchitecture, RopeScaling
from nested_reft_mcore.config.checkpoint_layout import read_checkpoint_architecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.config import hf_config, read_architecture
from nested_reft_mcore.hf.families import FAMILIES

MINIMAL = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 41,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
# What makes a minimal config of each family one that is supported.
NEEDED = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}}


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


def test_the_schema_knows_the_registered_families():
    choices = get_args(ModelArchitecture.model_fields["family"].annotation)
    assert list(choices) == list(FAMILIES) == list(NEEDED)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_takes_them_to_mean(tmp_path, family):
    write(tmp_path, model_type=family, num_attention_heads=64, hidden_size=128, **NEEDED[family])
    ours, theirs = read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 2)
    assert ours.untie_embeddings_and_output_weights == (not theirs.tie_word_embeddings)
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None
    assert ours.layernorm_epsilon == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.init_method_std == theirs.initializer_range


@pytest.mark.parametrize("family", FAMILIES)
def test_null_key_value_heads_are_as_many_as_heads(tmp_path, family):
    write(tmp_path, model_type=family, num_key_value_heads=None, **NEEDED[family])
    assert read_architecture(tmp_path).num_query_groups == 4
    if family != "mistral":  # whose class refuses null though its code allows for it
        assert AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3, "original_max_position_embeddings": 99},
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                key: value for key, value in LLAMA3.items() if not key.startswith("original")
            },
            "max_position_embeddings": 48,
        },
    ],
)
def test_llama3_scaling_is_read_as_transformers_computes_it(tmp_path, family, changes):
    write(tmp_path, model_type=family, num_key_value_heads=2, **NEEDED[family], **changes)
    ours, theirs = read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.rotary_base == 500.0
    # Computing completes what reading the file leaves open.
    ROPE_INIT_FUNCTIONS["llama3"](theirs)
    names = RopeScaling.model_fields
    assert ours.rope_scaling.model_dump() == {name: theirs.rope_parameters[name] for name in names}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; .*llama, mistral, qwen2, qwen3"),
        ({"model_type": "absent"}, "model_type None .*llama, mistral, qwen2, qwen3"),
        ({"model_type": "mixtral"}, "mixture of experts .*'mixtral'.* llama, mistral"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "of experts .*'qwen3_moe', num_experts 8"),
        ({"num_local_experts": 4}, "mixture of experts .*num_local_experts 4"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'.*'llama3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*'llama3'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters of .*'llama3': missing low_freq_factor, high_freq_factor",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": "x"}}, "rope_scaling.factor: .*'x'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"model_type": "mistral"}, r"sliding_window 4096 \(what an absent key means\)"),
        ({"model_type": "mistral", "sliding_window": 99}, "sliding_window 99 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'.*'full_"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            "use_sliding_window",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0},
            "use_sliding_window",
        ),
        ({"attention_bias": True}, "attention_bias True is not supported for llama"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias True .*for qwen3"),
        ({"model_type": "qwen3", "head_dim": None}, "head_dim None is not supported for qwen3"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'.*'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "num_layers.*'many'"),
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads 4"),
        ({"hidden_size": 50}, "4 does not divide hidden_size 50"),
        ({"head_dim": 7}, "size 7 .*even"),
    ],
)
def test_unsupported_configs_are_refused_by_name(tmp_path, changes, named):
    write(tmp_path, **changes)
    with pytest.raises(UserError, match=named) as caught:
        read_architecture(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {
            "use_sliding_window": True,
            "max_window_layers": 1,
            "layer_types": ["full_attention"] * 3,
        },
    ],
)
def test_a_window_that_no_layer_uses_is_accepted(tmp_path, family, changes):
    write(tmp_path, model_type=family, num_key_value_heads=2, **changes)
    assert read_architecture(tmp_path).family == family
    assert set(AutoConfig.from_pretrained(tmp_path).layer_types) == {"full_attention"}


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_architecture(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("untied", [False, True])
def test_export_reads_back_the_same_and_loads_in_transformers(tmp_path, family, untied):
    scaling = RopeScaling(**{name: LLAMA3[name] for name in RopeScaling.model_fields})
    architecture = ModelArchitecture(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=40,
        kv_channels=8,
        vocab_size=41,
        rotary_base=777.0,
        rope_scaling=scaling if untied else None,
        layernorm_epsilon=1e-5,
        max_position_embeddings=99,
        add_qkv_bias=FAMILIES[family].add_qkv_bias,
        qk_layernorm=FAMILIES[family].qk_layernorm,
        untie_embeddings_and_output_weights=untied,
        family=family,
        init_method_std=0.3,
    )
    exported = hf_config(architecture, dtype="bfloat16", eos_token_id=[3, 4])
    (tmp_path / "config.json").write_text(json.dumps(exported))
    assert read_architecture(tmp_path) == architecture
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters == {
        **(LLAMA3 if untied else {"rope_type": "default"}),
        "rope_theta": 777.0,
    }
    # What transformers 4 reads.
    assert exported["rope_theta"] == 777.0
    assert exported.get("rope_scaling") == (LLAMA3 if untied else None)
    assert theirs.eos_token_id == [3, 4]
    assert theirs.bos_token_id is None
    assert theirs.tie_word_embeddings == (not untied)
    assert str(theirs.dtype) == "torch.bfloat16"
    assert theirs.architectures == [FAMILIES[family].class_name]
    assert getattr(theirs, "sliding_window", None) is None


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"add_qkv_bias": True}, "'llama' with add_qkv_bias=True"),
        ("qwen2", {}, "'qwen2' with add_qkv_bias=False .* always has add_qkv_bias=True"),
        ("qwen3", {}, "'qwen3' with qk_layernorm=False .* always has qk_layernorm=True"),
        ("mistral", {"qk_layernorm": True}, "'mistral' with qk_layernorm=True"),
        ("llama", {"hidden_size": 9, "kv_channels": 4}, "heads=2 and hidden_size=9"),
    ],
)
def test_what_has_no_layout_is_refused(family, changes, named):
    shape = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "ffn_hidden_size": 8,
        "vocab_size": 8,
    }
    with pytest.raises(UserError, match=named):
        hf_config(ModelArchitecture(**{**shape, "family": family, **changes}))


def test_an_architecture_of_before_these_options_is_read(tmp_path):
    """As runs wrote it when there were Llama and Qwen2 only."""
    old = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "ffn_hidden_size": 8,
        "kv_channels": None,
        "vocab_size": 8,
        "max_position_embeddings": 32,
        "rotary_base": 10000.0,
        "layernorm_epsilon": 1e-6,
        "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": False,
        "family": "qwen2",
        "init_method_std": 0.02,
        "embedding_init_method_std": None,
    }
    (tmp_path / "architecture.json").write_text(json.dumps(old))
    architecture = read_checkpoint_architecture(tmp_path)
    assert architecture.model_dump(exclude={"qk_layernorm", "rope_scaling"}) == old
    assert not architecture.qk_layernorm
    assert architecture.rope_scaling is None
    scaled = architecture.model_copy(
        update={"rope_scaling": RopeScaling(**{n: LLAMA3[n] for n in RopeScaling.model_fields})}
    )
    (tmp_path / "architecture.json").write_text(scaled.model_dump_json())
    assert read_checkpoint_architecture(tmp_path) == scaled


def test_reading_a_config_does_not_import_torch():
    code = (
        "import sys, nested_reft_mcore.hf.config; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
