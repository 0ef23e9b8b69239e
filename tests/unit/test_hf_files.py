"""Hugging Face directories on disk: what is read, written, refused and left behind."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_reft_mcore.checkpoints.staging import (
    check_output_is_free,
    check_room,
    staged_directory,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.directory_writer import ShardWriter, plan_shards, write_json
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.tokenizer_files import (
    SpecialTokens,
    copy_tokenizer_files,
    special_tokens,
)
from nested_reft_mcore.hf.transforms import TensorPart

SHAPES = {"one": (4, 3), "two": (2,)}
TENSORS = {"one": torch.arange(12.0).reshape(4, 3), "two": torch.tensor([5.0, 6.0])}


def write(output: Path, max_shard_bytes: int = 10**9, fail: bool = False) -> None:
    plan = plan_shards(SHAPES, torch.float32, max_shard_bytes)
    with staged_directory(output) as directory:
        with ShardWriter(directory, plan) as writer:
            writer.add("one", TENSORS["one"][:3])
            writer.add("one", TENSORS["one"][3:])
            if fail:
                raise RuntimeError("power cut")
            writer.add("two", TENSORS["two"])
        write_json(directory / "config.json", {"model_type": "llama"})
        plan.finish(directory)


@pytest.mark.parametrize("max_shard_bytes", [50, 10**6])
def test_parts_are_read_from_one_file_or_many(tmp_path, max_shard_bytes):
    write(tmp_path / "model", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model/model.safetensors.index.json").exists() == (max_shard_bytes == 50)
    with SafetensorsReader(tmp_path / "model") as reader:
        assert reader.names == {"one", "two"}
        assert reader.shape("one") == (4, 3)
        assert torch.equal(reader.read("one"), TENSORS["one"])
        assert torch.equal(reader.read("one", TensorPart(0, 1, 3)), TENSORS["one"][1:3])
        assert torch.equal(reader.read("one", TensorPart(1, 2, 3)), TENSORS["one"][:, 2:3])
        assert torch.equal(reader.read("two", TensorPart(0, 1, 2)), torch.tensor([6.0]))
        assert reader.read("one", TensorPart(0, 4, 4)).shape == (0, 3)


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"safetensors only \(pickled .bin files are refused\)"):
        SafetensorsReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a safetensors file"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("../other.safetensors", "a file in the same directory"),
        (3, "a file in the same directory"),
        ("absent.safetensors", "no such file"),
        ("there.safetensors", "no tensor lost"),
    ],
)
def test_an_index_that_lies_is_an_error(tmp_path, file_name, message):
    save_file({"other": torch.zeros(1)}, tmp_path / "there.safetensors")
    index = {"weight_map": {"lost": file_name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message), SafetensorsReader(tmp_path) as reader:
        reader.read("lost")


def test_a_file_may_be_read_by_whoever_reads_its_directory(tmp_path):
    write(tmp_path / "model")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_shards_are_filled_in_order_and_a_large_tensor_stands_alone():
    shapes = {"a": (2,), "b": (100,), "c": (1,), "d": (1,)}
    assert plan_shards(shapes, torch.float32, 16).files == {
        "model-00001-of-00003.safetensors": {"a": (2,)},
        "model-00002-of-00003.safetensors": {"b": (100,)},
        "model-00003-of-00003.safetensors": {"c": (1,), "d": (1,)},
    }
    assert list(plan_shards(shapes, torch.bfloat16, 10**6).files) == ["model.safetensors"]
    with pytest.raises(ValueError, match="max_shard_bytes"):
        plan_shards(shapes, torch.float32, 0)


def test_every_writer_gets_files_of_its_own():
    shapes = {str(number): (10,) for number in range(12)}
    plan = plan_shards(shapes, torch.float32, num_writers=3)
    shares = [plan.files_of(rank, 3) for rank in range(3)]
    assert [sum(len(plan.files[file]) for file in share) for share in shares] == [4, 4, 4]
    assert sorted(file for share in shares for file in share) == sorted(plan.files)


def test_tensors_out_of_turn_are_an_error(tmp_path):
    plan = plan_shards(SHAPES, torch.float32)
    for name, values in (("two", TENSORS["two"]), ("one", torch.zeros(13))):
        with (
            pytest.raises(ValueError, match="expected up to 12 values of one"),
            ShardWriter(tmp_path, plan) as writer,
        ):
            writer.add(name, values)
    with (
        pytest.raises(ValueError, match="never added: one"),
        ShardWriter(tmp_path, plan) as writer,
    ):
        writer.add("one", TENSORS["one"][:2])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"never written: model\.safetensors"):
        plan.finish(tmp_path)


@pytest.mark.parametrize("was_there", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path, was_there):
    if was_there:
        write(tmp_path / "model")
        (tmp_path / "model/model.safetensors").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="power cut"):
        write(tmp_path / "model", fail=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * was_there
    if was_there:
        assert (tmp_path / "model/model.safetensors").read_bytes() == b"old"
        write(tmp_path / "model")
        assert torch.equal(load_file(tmp_path / "model/model.safetensors")["two"], TENSORS["two"])
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_a_directory_of_its_kind_is_replaced_and_only_by_force(tmp_path):
    def check(output: Path, force: bool) -> None:
        check_output_is_free(output, marker="config.json", kind="models", force=force)

    check(tmp_path / "absent", force=False)
    (tmp_path / "model").mkdir()
    check(tmp_path / "model", force=False)
    write(tmp_path / "model")
    with pytest.raises(UserError, match=r"not empty.*--force"):
        check(tmp_path / "model", force=False)
    check(tmp_path / "model", force=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"replaces models only.*no config\.json"):
        check(home, force=True)
    with pytest.raises(UserError, match="found a file"):
        check(home / "thesis.tex", force=True)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    check_room(tmp_path / "deep" / "model", 10)
    with pytest.raises(UserError, match=r"deep/model: needs 1000000\.\d\d GB, but .* GB free"):
        check_room(tmp_path / "deep" / "model", 10**15)
    assert not list(tmp_path.iterdir())


def test_a_place_without_permission_is_refused():
    """Root may write anywhere, so it becomes nobody for a moment."""
    with tempfile.TemporaryDirectory(dir="/tmp") as room:
        Path(room).chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=f"no permission to write to {room}"):
                check_room(Path(room) / "model", 10)
            with (
                pytest.raises(UserError, match="cannot be written: Permission denied"),
                staged_directory(Path(room) / "model"),
            ):
                pass
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("output", ["/proc/model", "/dev/null/model"])
def test_where_nothing_can_be_written_the_place_is_named(output):
    with (
        pytest.raises(UserError, match=f"{output}: cannot be written"),
        staged_directory(Path(output)),
    ):
        pass


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    import sentencepiece

    directory = tmp_path_factory.mktemp("pieces")
    corpus = directory / "corpus.txt"
    corpus.write_text("tom gets 3 loses 2\n" * 20)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus),
        model_prefix=str(directory / "tiny"),
        vocab_size=20,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    return directory / "tiny.model"


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_sentencepiece_tokenizer_is_copied_with_its_special_tokens(
    tmp_path, sentencepiece_model, as_directory
):
    source = sentencepiece_model.parent if as_directory else sentencepiece_model
    copy_tokenizer_files(source, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    assert special_tokens(source) == SpecialTokens(None, 2, 3)


def test_a_models_own_configuration_says_where_completions_end(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1, "bos_token_id": 0}')
    assert special_tokens(tmp_path) == SpecialTokens(0, 1, None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert special_tokens(tmp_path) == SpecialTokens(None, [4, 5], None)


def test_a_source_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        copy_tokenizer_files(tmp_path, tmp_path)
