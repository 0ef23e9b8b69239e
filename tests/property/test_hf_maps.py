"""The maps between Hugging Face's and Megatron's tensors, for any shape and parallel size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.hf.families import FAMILIES, weight_map
from nested_reft_mcore.hf.transforms import (
    from_mcore,
    hf_part,
    padded_vocab_size,
    to_mcore,
    tp_join,
    tp_slice,
)
from nested_reft_mcore.hf.weight_map import MapEntry, WeightKind


@st.composite
def architectures(draw) -> tuple[ModelArchitecture, int]:
    """An architecture and a tensor-parallel size that divides it."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp_size * draw(st.integers(1, 2))
    family = draw(st.sampled_from(list(FAMILIES)))
    architecture = ModelArchitecture(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 7)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        ffn_hidden_size=tp_size * draw(st.integers(1, 4)),
        kv_channels=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 300)),
        add_qkv_bias=FAMILIES[family].add_qkv_bias,
        qk_layernorm=FAMILIES[family].qk_layernorm,
        untie_embeddings_and_output_weights=draw(st.booleans()),
        family=family,
    )
    return architecture, tp_size


def tensors_of(entry: MapEntry, architecture: ModelArchitecture) -> list[torch.Tensor]:
    """Different numbers in every element of every tensor of the entry."""
    tensors, start = [], 1
    for tensor in entry.tensors:
        shape = tensor.shape(architecture)
        count = torch.Size(shape).numel()
        tensors.append(torch.arange(start, start + count).reshape(shape))
        start += count
    return tensors


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_every_entry_survives_both_directions_and_the_cut(case):
    architecture, tp_size = case
    padded = padded_vocab_size(architecture.vocab_size, tp_size)
    for entry in weight_map(architecture).entries:
        tensors = tensors_of(entry, architecture)
        full = to_mcore(entry.kind, tensors, architecture)
        assert full.shape == entry.full_shape(architecture)
        back = from_mcore(entry.kind, full, architecture)
        assert len(back) == len(tensors)
        assert all(torch.equal(one, two) for one, two in zip(back, tensors, strict=True))
        shards = [tp_slice(entry.kind, full, rank, tp_size, padded) for rank in range(tp_size)]
        assert torch.equal(tp_join(entry.kind, shards, architecture.vocab_size), full)


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_the_parts_that_a_rank_reads_make_its_shard(case):
    architecture, tp_size = case
    padded = padded_vocab_size(architecture.vocab_size, tp_size)
    for entry in weight_map(architecture).entries:
        tensors = tensors_of(entry, architecture)
        full = to_mcore(entry.kind, tensors, architecture)
        for rank in range(tp_size):
            parts = []
            for tensor in tensors:
                part = hf_part(entry.kind, tensor.shape, rank, tp_size, padded)
                is_whole = part is None
                parts.append(
                    tensor
                    if is_whole
                    else tensor.narrow(part.dim, part.start, part.stop - part.start)
                )
            made = to_mcore(entry.kind, parts, architecture)
            shard = tp_slice(entry.kind, full, rank, tp_size, padded)
            if entry.kind is WeightKind.VOCAB:
                assert shard.shape[0] == padded // tp_size
                assert not shard[made.shape[0] :].any()
                shard = shard[: made.shape[0]]
            assert torch.equal(made, shard)


@settings(max_examples=40, deadline=None)
@given(architectures())
def test_names_are_unique_and_both_specs_are_known(case):
    architecture, _ = case
    mapping = weight_map(architecture)
    names = [tensor.name for entry in mapping.entries for tensor in entry.tensors]
    assert list(mapping.hf_shapes) == names
    layer = architecture.num_layers - 1
    for local, engine in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ):
        entries = [mapping.by_mcore_name[f"decoder.layers.{layer}.{n}"] for n in (local, engine)]
        assert entries[0] == entries[1]
    untied = architecture.untie_embeddings_and_output_weights
    assert ("lm_head.weight" in mapping.hf_shapes) == untied
    (output,) = mapping.by_mcore_name["output_layer.weight"].tensors
    assert output.name == ("lm_head.weight" if untied else "model.embed_tokens.weight")
    assert f"decoder.layers.{architecture.num_layers}.mlp.linear_fc2.weight" not in (
        mapping.by_mcore_name
    )


def test_qkv_is_interleaved_per_group():
    """Two groups of two heads of size 1: [q0 q1 k0 v0 | q2 q3 k1 v1]."""
    architecture = ModelArchitecture(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=2,
        kv_channels=1,
        vocab_size=1,
    )
    query, key, value = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    full = to_mcore(WeightKind.QKV, (query, key, value), architecture)
    assert full.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert tp_slice(WeightKind.QKV, full, 1, 2, 0).tolist() == [2, 3, 11, 21]


def test_gate_and_up_are_cut_apart():
    full = torch.tensor([[0], [1], [10], [11]])
    assert tp_slice(WeightKind.GATE_UP, full, 1, 2, 0).flatten().tolist() == [1, 11]


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "padded"),
    [(41, 1, 128), (41, 2, 256), (128, 1, 128), (151936, 1, 151936), (151936, 2, 152064),
     (151936, 8, 152576), (152064, 8, 152576)],
)  # fmt: skip
def test_padded_vocabulary(vocab_size, tp_size, padded):
    assert padded_vocab_size(vocab_size, tp_size) == padded


def test_an_indivisible_width_is_an_error():
    with pytest.raises(ValueError, match="size 2 does not divide 3"):
        tp_slice(WeightKind.ROW_PARALLEL, torch.zeros(2, 3), 0, 2, 0)
