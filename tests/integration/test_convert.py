"""Hugging Face directory to checkpoint and back, through the tools and their real processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_cases import HfCase, read_tensors, write_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import nested_reft_mcore

REPOSITORY = Path(nested_reft_mcore.__file__).parent.parent


def run_tool(
    name: str,
    *arguments: str | Path,
    launcher: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a tool; `launcher` stands between Python and the tool."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    whole = [sys.executable, *launcher, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_model(HfCase("qwen2", untied=False), directory)
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 7}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by four processes, two that share each layer on two stages, and verified by them."""
    directory = tmp_path_factory.mktemp("converted") / "checkpoint"
    layout = ("--tensor-parallel", "2", "--pipeline-parallel", "2")
    done = run_tool(
        "convert_hf_to_mcore.py", "--hf", source, "--output", directory, *layout, "--verify"
    )
    assert done.returncode == 0, done.stderr
    assert largest_difference(done.stdout) < 1e-4
    assert len(list(directory.glob("__*_0.distcp"))) == 4
    return directory


def largest_difference(printed: str) -> float:
    """What `--verify` has found."""
    found = re.search(r"verified: 4 sequences.* largest difference (\S+) ", printed)
    assert found, printed
    return float(found.group(1))


def assert_same_model(source: Path, back: Path) -> None:
    expected, found = read_tensors(source), read_tensors(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    _, report = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(back).eos_token_id == 7


@pytest.mark.distributed
def test_there_and_back_keeps_every_bit(source: Path, checkpoint: Path, tmp_path: Path):
    """Back on three processes of torchrun: the checkpoint does not remember who wrote it."""
    back = tmp_path / "back"
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "3")
    done = run_tool(
        "convert_mcore_to_hf.py",
        *("--checkpoint", checkpoint, "--output", back, "--verify"),
        launcher=torchrun,
    )
    assert done.returncode == 0, done.stderr
    assert str(back) in done.stdout
    assert largest_difference(done.stdout) < 1e-4
    # Each process has a file of its own.
    assert len(list(back.glob("*.safetensors"))) >= 3
    assert_same_model(source, back)


def test_back_in_another_type_and_in_small_files(source: Path, checkpoint: Path, tmp_path: Path):
    back = tmp_path / "back"
    options = ("--dtype", "bfloat16", "--max-shard-size", "20KB", "--verify")
    done = run_tool(
        "convert_mcore_to_hf.py", "--checkpoint", checkpoint, "--output", back, *options
    )
    assert done.returncode == 0, done.stderr
    assert largest_difference(done.stdout) < 1e-4
    files = list(back.glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 25_000 for path in files)
    expected, found = read_tensors(source), read_tensors(back)
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)


def test_a_difference_above_the_tolerance_is_exit_code_1(source: Path, tmp_path: Path):
    done = run_tool(
        "convert_hf_to_mcore.py",
        *("--hf", source, "--output", tmp_path / "out", "--verify", "--tolerance", "1e-12"),
    )
    assert done.returncode == 1
    assert "ABOVE 1e-12" in done.stdout
    assert f"error: {tmp_path / 'out'} is not the model of {source}" in done.stderr


def test_a_user_s_mistake_is_exit_code_2_and_one_message(source: Path, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    cases = (
        ("convert_hf_to_mcore.py", ("--hf", source, "--output", home), "--force"),
        (
            "convert_hf_to_mcore.py",
            ("--hf", source, "--output", home, "--force"),
            "replaces checkpoints only",
        ),
        (
            "convert_hf_to_mcore.py",
            ("--hf", tmp_path / "no", "--output", tmp_path / "out"),
            str(tmp_path / "no" / "config.json"),
        ),
        (
            "convert_mcore_to_hf.py",
            ("--checkpoint", source, "--output", tmp_path / "out"),
            "not a checkpoint",
        ),
        (
            "convert_mcore_to_hf.py",
            ("--checkpoint", source, "--output", tmp_path / "out", "--max-shard-size", "5"),
            "--max-shard-size 5: expected a size such as 5GB",
        ),
    )
    for tool, arguments, message in cases:
        done = run_tool(tool, *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "thesis.tex"]


def test_inspect_tells_what_is_there(source: Path, checkpoint: Path, tmp_path: Path):
    done = run_tool("inspect_checkpoint.py", checkpoint, "--checksums", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["format"] == "Megatron distributed checkpoint (torch_dist)"
    assert found["num_parameters"] == sum(t.numel() for t in read_tensors(source).values())
    assert found["config"]["family"] == "qwen2"
    assert found["checksums"] == "read and right"
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    # Padded for the two processes that share each layer, a piece for each of them.
    embedding = tensors["embedding.word_embeddings.weight"]
    assert (embedding["shape"], embedding["num_pieces"]) == ([256, 32], 2)
    assert embedding["dtype"] == "float32"
    done = run_tool("inspect_checkpoint.py", source)
    assert done.returncode == 0
    assert "Hugging Face safetensors" in done.stdout
    assert "model.layers.3.mlp.down_proj.weight" in done.stdout
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    piece = changed / "__0_0.distcp"
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)
    assert run_tool("inspect_checkpoint.py", changed).returncode == 0
    done = run_tool("inspect_checkpoint.py", changed, "--checksums")
    assert done.returncode == 1
    assert "__0_0.distcp: has checksum" in done.stdout
    assert run_tool("inspect_checkpoint.py", tmp_path / "no").returncode == 2
