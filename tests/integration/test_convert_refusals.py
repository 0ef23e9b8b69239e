"""What a conversion refuses: each with its own message, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import HfCase, read_tensors, small_files_only, write_model
from safetensors.torch import load_file, save_file

from nested_reft_mcore.checkpoints.manifest import file_names, hash_files, write_manifest
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import HfToMcoreOptions, McoreToHfOptions, parse_size
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.training.conversion import hf_to_mcore, mcore_to_hf
from nested_reft_mcore.training.verification import compare_logits

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    yield initialize_parallel(ParallelConfig(), ranks, seed=0)
    shutdown()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    write_model(HfCase("qwen2", untied=True), directory)
    return directory


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "source"))


def convert(source: Path, context: ParallelContext, **options: Any) -> Path:
    output = source.parent / "output"
    assert (
        hf_to_mcore(HfToMcoreOptions(hf=str(source), output=str(output), **options), context) == 0
    )
    return output


def assert_refused(source: Path, context: ParallelContext, message: str, **options: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")}
    with pytest.raises(UserError, match=message):
        convert(source, context, **options)
    assert {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")} == before


def change_config(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"'mamba' is not supported; supported are llama"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding"),
        ({"model_type": "mixtral", "num_local_experts": 8}, r"mixtral|num_local_experts"),
        ({"num_hidden_layers": 3}, r"unexpected: model\.layers\.3\."),
        ({"intermediate_size": 39}, r"gate_proj.weight has shape \[40, 32\], .* \[39, 32\]"),
    ],
)
def test_configs_that_do_not_fit(
    source: Path, context: ParallelContext, changes: dict[str, Any], message: str
) -> None:
    change_config(source, **changes)
    assert_refused(source, context, message)


def test_tensors_that_do_not_fit(source: Path, context: ParallelContext) -> None:
    file = source / "model.safetensors"
    original = load_file(file)
    others = {name: tensor for name, tensor in original.items() if name != DOWN}
    save_file(others, file)
    assert_refused(source, context, rf"missing: {DOWN}")
    save_file({**original, "model.extra": torch.zeros(2)}, file)
    assert_refused(source, context, r"unexpected: model\.extra")
    save_file({**others, DOWN: original[DOWN].t().contiguous()}, file)
    assert_refused(
        source, context, rf"{DOWN} has shape \[40, 32\], the architecture has \[32, 40\]"
    )
    save_file({**others, DOWN: original[DOWN].to(torch.int8)}, file)
    assert_refused(source, context, rf"{DOWN} is of type I8; expected one of F32, BF16, F16")


def test_files_that_are_broken(source: Path, context: ParallelContext) -> None:
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert_refused(source, context, r"model\.safetensors: not a safetensors file")
    file.write_bytes(whole[:8] + b"\xff" * 64 + whole[72:])
    assert_refused(source, context, r"model\.safetensors: not a safetensors file")
    file.unlink()
    assert_refused(source, context, r"no model\.safetensors and no model\.safetensors\.index\.json")


def test_a_shard_that_the_index_names_is_not_there(
    tmp_path: Path, context: ParallelContext
) -> None:
    source = tmp_path / "source"
    write_model(HfCase("llama", untied=False), source, max_shard_size="20KB")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert_refused(source, context, rf"{lost.name}: no such file, but .*index\.json names it")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(
    source: Path, context: ParallelContext, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.self_attn.k_proj.weight"
    tensors[key][3, 4] = value
    save_file(tensors, file)
    message = rf"NaN or infinity in {key}; .*--allow-nonfinite"
    assert_refused(source, context, message)
    output = convert(source, context, allow_nonfinite=True)
    assert key in caplog.text
    back = source.parent / "back"
    mcore_to_hf(McoreToHfOptions(checkpoint=str(output), output=str(back)), context)
    found = read_tensors(back)[key]
    assert torch.equal(found.view(torch.int32), tensors[key].view(torch.int32))


def test_output_that_is_taken_is_replaced_by_force_only(
    source: Path, context: ParallelContext
) -> None:
    output = convert(source, context)
    assert_refused(source, context, r"is not empty; .*--force")
    (output / "stale").touch()
    convert(source, context, force=True)
    assert not (output / "stale").exists()
    # Still there after a conversion that fails.
    (source / "model.safetensors").unlink()
    assert_refused(source, context, r"no model\.safetensors", force=True)


def test_a_disk_that_is_too_small_is_known_before(
    source: Path, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(source)._replace(free=16 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = r"output: needs 0\.02 GB, but .* has 0\.02 GB free; free .* or choose another disk"
    assert_refused(source, context, message)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    source: Path, context: ParallelContext
) -> None:
    """Files may not grow beyond 20 KB, which is as good as a full disk."""
    with small_files_only(20_000):
        assert_refused(source, context, "output: cannot be written: File too large")


def test_a_place_where_nothing_can_be_written(original: Path, context: ParallelContext) -> None:
    options = HfToMcoreOptions(hf=str(original), output="/dev/null/model")
    with pytest.raises(UserError, match="/dev/null/model: no permission to write to /dev/null"):
        hf_to_mcore(options, context)


def test_checkpoints_that_do_not_fit(source: Path, context: ParallelContext) -> None:
    checkpoint = convert(source, context)

    def assert_not_exported(message: str, *, seal: bool = True, verify: bool = False) -> None:
        if seal:
            write_manifest(checkpoint, hash_files(checkpoint, file_names(checkpoint)))
        output = source.parent / "back"
        options = McoreToHfOptions(checkpoint=str(checkpoint), output=str(output), verify=verify)
        with pytest.raises(UserError, match=message):
            mcore_to_hf(options, context)
        assert sorted(path.name for path in source.parent.iterdir()) == ["output", "source"]

    architecture = checkpoint / "architecture.json"
    right = architecture.read_text()
    architecture.write_text(right.replace('"num_layers": 4', '"num_layers": 5'))
    assert_not_exported(r"linear_qkv.layer_norm_weight has shape \[4, 32\], .* \[5, 32\]")
    architecture.write_text(right.replace('"vocab_size": 1003', '"vocab_size": 1025'))
    assert_not_exported(r"word_embeddings.weight has shape \[1024, 32\], .* \[1025, 32\]")
    architecture.write_text(right)
    piece = checkpoint / "__0_0.distcp"
    whole = piece.read_bytes()
    piece.write_bytes(whole[: len(whole) // 2])
    assert_not_exported(r"__0_0\.distcp: broken at byte")
    piece.write_bytes(whole)
    write_manifest(checkpoint, hash_files(checkpoint, file_names(checkpoint)))
    piece.write_bytes(whole[:-1])
    assert_not_exported(r"is broken: __0_0\.distcp: has \d+ bytes", seal=False)
    piece.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_not_exported(r"is broken: __0_0\.distcp: has checksum", seal=False, verify=True)
    (checkpoint / "manifest.json").unlink()
    assert_not_exported(r"is broken: manifest\.json: missing", seal=False)


def test_sizes_are_read_as_transformers_writes_them() -> None:
    assert [parse_size("", text) for text in ("5GB", "1.5 mb", "20KB")] == [
        5 * 10**9,
        1500000,
        20000,
    ]
    for text in ("5", "GB", "0MB", "-1GB", "5PB"):
        with pytest.raises(UserError, match=rf"--max-shard-size {text}: expected a size such as"):
            parse_size("--max-shard-size", text)


def test_logits_are_compared_where_they_are_not_finite_too() -> None:
    one = torch.tensor([[0.0, torch.nan, torch.inf, 1.0]])
    assert compare_logits([one], [one.clone()]).largest_difference == 0
    assert compare_logits([one], [one + 0.5]).largest_difference == 0.5
    other = torch.tensor([[0.0, torch.nan, torch.inf, torch.nan]])
    assert compare_logits([one], [other]).largest_difference > 1e30
    found = compare_logits([one, one], [one, one])
    assert (found.num_sequences, found.num_tokens) == (2, 2)
