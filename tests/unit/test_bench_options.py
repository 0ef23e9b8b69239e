"""What is wrong with the options of `bench rollout` is said before anything starts."""

import sys
from pathlib import Path

import pytest

from nested_reft_mcore.config.bench import (
    BenchRolloutOptions,
    check_bench_model,
    check_bench_rollout,
    layers_of_percentage,
    parse_shape,
)
from nested_reft_mcore.config.errors import UserError

SHAPE = "hidden=64,layers=4,heads=4,groups=2,ffn=96,vocab=128"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got none"),
        ({"hf": "a", "checkpoint": "b"}, "got --hf and --checkpoint"),
        ({"shape": SHAPE, "skip": "0,120"}, "--skip 0,120: found '120'"),
        ({"shape": SHAPE, "skip": "ten"}, "found 'ten'"),
        ({"shape": SHAPE, "parts": "layer,head"}, "--parts head"),
        ({"shape": SHAPE, "parts": ""}, "is empty"),
        ({"shape": SHAPE, "peers": "llama"}, "--peers llama"),
        ({"shape": SHAPE, "peers": "vllm"}, "needs --vllm-python"),
        ({"shape": SHAPE, "vllm_python": sys.executable}, "does not name vllm"),
        ({"shape": SHAPE, "peers": "vllm", "vllm_python": "/nowhere"}, "no such program"),
        ({"shape": SHAPE, "output": "/nowhere/at/all.json"}, "does not exist"),
    ],
)
def test_options_that_contradict(given: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        check_bench_rollout(BenchRolloutOptions(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_tokens": 4000, "new_tokens": 97}, "make 4097 positions"),
        ({"skip": "80"}, "is 3 of 4 layers; with --border-layers 1 at most 2"),
        ({"contexts": "8192"}, "--contexts 8192"),
        ({"contexts": "16"}, "at least 25"),
        ({"contexts": "1k"}, "whole number"),
    ],
)
def test_options_that_do_not_fit_the_model(given: dict[str, object], message: str):
    options = BenchRolloutOptions.model_validate({"shape": SHAPE, **given})
    with pytest.raises(UserError, match=message):
        check_bench_model(options, parse_shape(SHAPE))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("hidden=64", "missing layers, heads"),
        (SHAPE + ",depth=3", "--shape depth=3"),
        (SHAPE.replace("vocab=128", "vocab=many"), "--shape vocab many"),
        (SHAPE.replace("heads=4", "heads=5"), "heads=5 does not divide hidden=64"),
        (SHAPE.replace("groups=2", "groups=3"), "groups=3 does not divide heads=4"),
        (SHAPE.replace("heads=4,groups=2", "heads=64,groups=2"), "expected even"),
    ],
)
def test_shapes_that_are_none(shape: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_shape(shape)


def test_shape_is_qwen2s_layout():
    model = BenchRolloutOptions(shape=SHAPE).model()
    assert model.architecture is not None
    assert model.architecture.add_qkv_bias
    assert model.architecture.family == "qwen2"
    assert not model.architecture.untie_embeddings_and_output_weights
    assert model.hf_path is None


def test_percentages_and_contexts(tmp_path: Path):
    options = BenchRolloutOptions(skip="50,5, 12.5", contexts="1024,128")
    assert options.percentages == (0.0, 5.0, 12.5, 50.0)
    assert options.context_lengths(4096) == (128, 1024)
    assert BenchRolloutOptions().context_lengths(2048) == (128, 1024)
    assert BenchRolloutOptions(contexts="none").context_lengths(2048) == ()
    assert [layers_of_percentage(p, 30) for p in (5, 10, 15, 25, 50)] == [2, 3, 5, 8, 15]
