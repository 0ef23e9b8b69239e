"""Hugging Face directory to checkpoint and back, through the tools and their real processes."""

import os
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


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_model(HfCase("qwen2", untied=False), directory)
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 7}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by two processes that share each layer."""
    directory = tmp_path_factory.mktemp("converted") / "checkpoint"
    done = run_tool(
        "convert_hf_to_mcore.py", "--hf", source, "--output", directory, "--tensor-parallel", "2"
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.distributed
def test_there_and_back_keeps_every_bit(source: Path, checkpoint: Path, tmp_path: Path):
    """Back on two pipeline stages: the checkpoint does not remember who wrote it."""
    options = ("--pipeline-parallel", "2")
    back = tmp_path / "back"
    done = run_tool(
        "convert_mcore_to_hf.py", "--checkpoint", checkpoint, "--output", back, *options
    )
    assert done.returncode == 0, done.stderr
    assert str(back) in done.stdout
    expected, found = read_tensors(source), read_tensors(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    _, report = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(back).eos_token_id == 7


@pytest.mark.distributed
def test_back_in_another_type(source: Path, checkpoint: Path, tmp_path: Path):
    back = tmp_path / "back"
    options = ("--dtype", "bfloat16", "--max-shard-size", "1")
    done = run_tool(
        "convert_mcore_to_hf.py", "--checkpoint", checkpoint, "--output", back, *options
    )
    assert done.returncode == 0, done.stderr
    expected, found = read_tensors(source), read_tensors(back)
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)


def test_what_is_there_is_not_written_over(source: Path, tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    done = run_tool("convert_hf_to_mcore.py", "--hf", source, "--output", home)
    assert done.returncode == 2
    assert "--force" in done.stderr
    done = run_tool("convert_hf_to_mcore.py", "--hf", source, "--output", home, "--force")
    assert done.returncode == 2
    assert "replaces checkpoints only" in done.stderr
    assert (home / "thesis.tex").exists()


def test_a_source_that_is_not_there_or_not_supported_is_named(source: Path, tmp_path: Path):
    done = run_tool("convert_hf_to_mcore.py", "--hf", tmp_path / "no", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert str(tmp_path / "no" / "config.json") in done.stderr
    mamba = tmp_path / "mamba"
    shutil.copytree(source, mamba)
    (mamba / "config.json").write_text('{"model_type": "mamba"}')
    done = run_tool("convert_hf_to_mcore.py", "--hf", mamba, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "'mamba' is not supported; supported are llama, mistral, qwen2, qwen3" in done.stderr
    done = run_tool("convert_mcore_to_hf.py", "--checkpoint", source, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "not a checkpoint" in done.stderr
    assert not (tmp_path / "out").exists()
