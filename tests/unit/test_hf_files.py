"""Hugging Face directories on disk: what is read, written, refused and left behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.directory_writer import HfDirectoryWriter, plan_shards
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.tokenizer_files import (
    SpecialTokens,
    copy_tokenizer_files,
    special_tokens,
)
from nested_reft_mcore.hf.transforms import TensorPart

SHAPES = {"one": (4, 3), "two": (2,)}
TENSORS = {"one": torch.arange(12.0).reshape(4, 3), "two": torch.tensor([5.0, 6.0])}


def write(directory: Path, **options) -> None:
    with HfDirectoryWriter(directory, SHAPES, torch.float32, **options) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.write_json("config.json", {"model_type": "llama"})


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
    assert plan_shards(shapes, torch.float32, 16) == {
        "model-00001-of-00003.safetensors": ["a"],
        "model-00002-of-00003.safetensors": ["b"],
        "model-00003-of-00003.safetensors": ["c", "d"],
    }
    assert list(plan_shards(shapes, torch.bfloat16, 10**6)) == ["model.safetensors"]


def test_a_failed_write_leaves_nothing(tmp_path):
    def write_one_and(fail: bool) -> None:
        with HfDirectoryWriter(
            tmp_path / "model", SHAPES, torch.float32, max_shard_bytes=50
        ) as writer:
            writer.add("one", TENSORS["one"])
            if fail:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_one_and(fail=True)
    with pytest.raises(ValueError, match="never added: two"):
        write_one_and(fail=False)
    assert not list(tmp_path.iterdir())


def test_only_a_hugging_face_directory_is_replaced_and_only_by_force(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    write(target)
    (target / "stale.txt").write_text("old")
    with pytest.raises(UserError, match=r"not empty.*--force"):
        write(target)
    assert (target / "stale.txt").exists()
    write(target, force=True)
    assert not (target / "stale.txt").exists()
    assert torch.equal(load_file(target / "model.safetensors")["one"], TENSORS["one"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"no config\.json"):
        write(home, force=True)
    assert (home / "thesis.tex").exists()
    with pytest.raises(UserError, match="found a file"):
        write(home / "thesis.tex", force=True)


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
