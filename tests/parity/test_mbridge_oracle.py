"""Our weight maps against those of mbridge, an independent package, for the families of both."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.hf.config import hf_config
from nested_reft_mcore.hf.families import FAMILIES, weight_map
from nested_reft_mcore.hf.transforms import from_mcore, to_mcore, tp_slice
from nested_reft_mcore.hf.weight_map import MapEntry

# mbridge has no Mistral, whose layout is Llama's.
SHARED = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def mbridge() -> ModuleType:
    return pytest.importorskip(
        "mbridge", reason="the oracle mbridge (or einops, which it imports) is not installed"
    )


def architecture(family: str) -> ModelArchitecture:
    """Untied, for mbridge's tied mapping stays in its class; the vocabulary needs no padding."""
    return ModelArchitecture(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=20,
        kv_channels=10,
        vocab_size=512,
        add_qkv_bias=FAMILIES[family].add_qkv_bias,
        qk_layernorm=FAMILIES[family].qk_layernorm,
        untie_embeddings_and_output_weights=True,
        family=family,
    )


def bridge_of(mbridge: ModuleType, shape: ModelArchitecture, tp_size: int) -> Any:
    from mbridge.core.parallel_states import ParallelStates

    config = AutoConfig.for_model(**hf_config(shape))
    return mbridge.AutoBridge.from_config(
        config, dtype=torch.float32, parallel_states=ParallelStates(tp_size=tp_size)
    )


def tensors_of(entry: MapEntry, shape: ModelArchitecture) -> list[torch.Tensor]:
    """Different numbers in every element."""
    tensors, start = [], 1
    for tensor in entry.tensors:
        sizes = tensor.shape(shape)
        count = torch.Size(sizes).numel()
        tensors.append(torch.arange(start, start + count, dtype=torch.float32).reshape(sizes))
        start += count
    return tensors


def assert_equal(found: Any, expected: Any, name: str) -> None:
    assert len(found) == len(expected), name
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True)), name


@pytest.mark.parametrize("family", SHARED)
def test_names_merging_and_cuts_are_those_of_mbridge(mbridge: ModuleType, family: str) -> None:
    shape = architecture(family)
    bridge = bridge_of(mbridge, shape, tp_size=1)
    for entry in weight_map(shape).entries:
        # mbridge builds Transformer Engine's layers.
        name = entry.mcore_names[-1]
        names = [tensor.name for tensor in entry.tensors]
        assert bridge._weight_name_mapping_mcore_to_hf(name) == names
        tensors = tensors_of(entry, shape)
        full = to_mcore(entry.kind, tensors, shape)
        assert_equal([bridge._weight_to_mcore_format(name, tensors)], [full], name)
        its_names, its_tensors = bridge._weight_to_hf_format(name, full)
        assert its_names == names
        assert_equal(its_tensors, from_mcore(entry.kind, full, shape), name)
        assert_equal(its_tensors, tensors, name)
        for tp_size in (2, 4):
            cut = [tp_slice(entry.kind, full, r, tp_size, shape.vocab_size) for r in range(tp_size)]
            cutting = bridge_of(mbridge, shape, tp_size)
            its_cut = cutting._weight_split_across_tp(name, full, cut[0], tp_size)
            assert_equal(its_cut, cut, f"{name} at TP{tp_size}")
