"""One process: our model computes what transformers computes, and exports what it loaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_cases import CASES, HfCase, read_tensors, sequences, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.hf.config import read_architecture
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.hf_weights import export_hf_weights, load_hf_weights
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy, build_policy


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    yield initialize_parallel(ParallelConfig(), ranks, seed=0)
    shutdown()


def loaded_policy(hf_dir: Path, context: ParallelContext, **model) -> Policy:
    config = ModelConfig(hf_path=str(hf_dir), **model)
    policy = build_policy(read_architecture(hf_dir), config, ParallelConfig(), context)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.fill_(float("nan"))
    load_hf_weights(policy, hf_dir)
    return policy


def logits_of(policy: Policy, case: HfCase) -> torch.Tensor:
    tokens = sequences(case)
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    with torch.no_grad():
        logits = policy.chunks[0](tokens, positions, None)
    return logits[..., : policy.architecture.vocab_size].float()


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = read_tensors(one), read_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_transformers_and_the_export_is_what_was_loaded(
    case: HfCase, tmp_path: Path, context: ParallelContext
):
    model = write_model(case, tmp_path / "in")
    policy = loaded_policy(tmp_path / "in", context)
    with torch.no_grad():
        expected = model(sequences(case)).logits
    torch.testing.assert_close(logits_of(policy, case), expected, rtol=0, atol=1e-5)
    export_hf_weights(policy, tmp_path / "out")
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    exported, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(exported) is type(model)
    assert exported.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(exported.eval()(sequences(case)).logits, expected)


def test_shards_in_and_out(tmp_path: Path, context: ParallelContext):
    write_model(HfCase("qwen3", untied=False), tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    policy = loaded_policy(tmp_path / "in", context)
    export_hf_weights(policy, tmp_path / "out", max_shard_bytes=30_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 30_000 for file in files)
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "in")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_bfloat16_round_trip_keeps_every_bit(tmp_path: Path, context: ParallelContext):
    write_model(CASES[0], tmp_path / "in", dtype=torch.bfloat16)
    policy = loaded_policy(tmp_path / "in", context, dtype="bfloat16")
    export_hf_weights(policy, tmp_path / "out")
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_tokenizer_travels_with_the_weights(tmp_path: Path, context: ParallelContext):
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_model(CASES[0], tmp_path / "in")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 7}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "in")
    policy = loaded_policy(tmp_path / "in", context)
    export_hf_weights(policy, tmp_path / "out", tmp_path / "in")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("b a b").input_ids == [1, 0, 1]
    assert exported.chat_template == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == 7
    assert model.generation_config.eos_token_id == 7


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, context: ParallelContext):
    write_model(CASES[1], tmp_path)
    file = tmp_path / "model.safetensors"
    original = load_file(file)
    down = "model.layers.2.mlp.down_proj.weight"
    broken = {
        r"missing: model.layers.2.mlp.down_proj.weight": {
            name: tensor for name, tensor in original.items() if name != down
        },
        r"unexpected: model.extra.weight": {**original, "model.extra.weight": torch.zeros(2)},
        r"model.layers.2.mlp.down_proj.weight has shape \[40, 32\], .* \[32, 40\]": {
            **original,
            down: original[down].t().contiguous(),
        },
        r"lm_head.weight has shape \[40, 32\], .* \[1003, 32\]": {
            **original,
            "lm_head.weight": original["lm_head.weight"][:40],
        },
    }
    for message, tensors in broken.items():
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            loaded_policy(tmp_path, context)


def test_what_old_files_hold_too_is_no_mistake(tmp_path: Path, context: ParallelContext):
    case = CASES[0]
    model = write_model(case, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_file(tensors, file)
    with torch.no_grad():
        expected = model(sequences(case)).logits
    found = logits_of(loaded_policy(tmp_path, context), case)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_architecture_without_a_layout_is_refused(tmp_path: Path, context: ParallelContext):
    write_model(CASES[0], tmp_path / "in")
    shape = read_architecture(tmp_path / "in").model_copy(update={"add_qkv_bias": True})
    config = ModelConfig(architecture=shape)
    policy = build_policy(shape, config, ParallelConfig(), context)
    with pytest.raises(UserError, match=r"linear_qkv\.bias"):
        load_hf_weights(policy, tmp_path / "in")
    with pytest.raises(UserError, match="add_qkv_bias=True"):
        export_hf_weights(policy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
