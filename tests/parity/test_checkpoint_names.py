"""The names under which a checkpoint holds a policy, the same for both layer specs.

Transformer Engine's modules own the norms that they fuse, so their names need no translation; the
local spec renames its norms when it writes. Both names stand in the weight maps.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nested_reft_mcore.checkpoints.manifest import file_names, hash_files, write_manifest
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.hf.families import FAMILIES, weight_map
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.checkpoint import load_weights, save_weights
from nested_reft_mcore.mcore.checkpoint_safety import read_index
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import build_policy
from nested_reft_mcore.mcore.weights import initialize_weights

COMMON = {
    "embedding.word_embeddings.weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    "decoder.layers.self_attention.linear_proj.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.mlp.linear_fc1.weight",
    "decoder.layers.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
}
OWN = {
    "llama": set(),
    "mistral": set(),
    "qwen2": {"decoder.layers.self_attention.linear_qkv.bias"},
    "qwen3": {
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.self_attention.k_layernorm.weight",
    },
}


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    yield initialize_parallel(ParallelConfig(), ranks, seed=0)
    shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_policy_writes_transformer_engines_names(
    context: ParallelContext, family: str
) -> None:
    shape = ModelArchitecture(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        ffn_hidden_size=8,
        vocab_size=8,
        add_qkv_bias=FAMILIES[family].add_qkv_bias,
        qk_layernorm=FAMILIES[family].qk_layernorm,
        untie_embeddings_and_output_weights=True,
        family=family,
    )
    model = ModelConfig(architecture=shape, transformer_impl="local")
    (chunk,) = build_policy(shape, model, ParallelConfig(), context).chunks
    names = {name for name, _ in chunk.named_parameters()}
    assert "decoder.layers.0.input_layernorm.weight" in names
    state = chunk.sharded_state_dict()
    written = {state[name].key for name in names}
    assert written == COMMON | OWN[family]
    # Beside the parameters there is only what Megatron's linear layers keep for float8.
    others = {value.key for value in state.values()} - written
    assert all(name.endswith("._extra_state") for name in others)
    # The last name of an entry is the one under Transformer Engine.
    engine = {entry.mcore_names[-1] for entry in weight_map(shape).entries}
    assert {re.sub(r"layers\.\d+\.", "layers.", name) for name in engine} == written


def test_scales_that_another_spec_has_written_or_not_are_no_obstacle(
    context: ParallelContext, tmp_path: Path
) -> None:
    """A checkpoint without the float8 scales of this spec, and with one of another."""
    shape = ModelArchitecture(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        ffn_hidden_size=8,
        vocab_size=8,
    )
    model = ModelConfig(architecture=shape, transformer_impl="local")
    policy = build_policy(shape, model, ParallelConfig(), context)
    initialize_weights(policy, seed=1)
    save_weights(policy, tmp_path / "saved")
    index = read_index(tmp_path / "saved")
    entries = index.state_dict_metadata
    scales = [key for key in entries if "._extra_state/" in key]
    assert len(scales) == 8
    entries["decoder.layers.self_attention.core_attention._extra_state/shard_0_2"] = entries[
        scales[0]
    ]
    for key in scales:
        del entries[key]
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(index))
    hashed = hash_files(tmp_path / "saved", file_names(tmp_path / "saved"))
    write_manifest(tmp_path / "saved", hashed)
    expected = [parameter.clone() for parameter in policy.chunks[0].parameters()]
    initialize_weights(policy, seed=2)
    load_weights(policy, tmp_path / "saved")
    found = list(policy.chunks[0].parameters())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
