"""Tiny random Hugging Face models, and what one process of a layout makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.hf.config import read_architecture
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.hf_weights import export_hf_weights, load_hf_weights
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import build_policy
from nested_reft_mcore.mcore.pipeline import forward_logprobs
from nested_reft_mcore.rollout.batch import TrainingBatch

VOCAB_SIZE = 41
NUM_LAYERS = 4


@dataclass(frozen=True)
class HfCase:
    """One model: its family, and whether its output layer has weights of its own."""

    family: str
    untied: bool

    def __str__(self) -> str:
        return f"{self.family}-{'untied' if self.untied else 'tied'}"


CASES = tuple(HfCase(family, untied) for family in ("llama", "qwen2") for untied in (False, True))


def write_model(
    case: HfCase, directory: Path, dtype: torch.dtype = torch.float32, **save_options: Any
) -> PreTrainedModel:
    """Save a model all of whose parameters are random: grouped queries, heads wider than usual."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": not case.untied,
        "bos_token_id": None,
        "eos_token_id": 7,
    }
    config = LlamaConfig(**shape) if case.family == "llama" else Qwen2Config(**shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + values if "norm" in name else values)
    model.save_pretrained(directory, **save_options)
    return model


def sequences() -> Tensor:
    """`[batch, seq + 1]` token ids."""
    return torch.randint(0, VOCAB_SIZE, (2, 14), generator=torch.Generator().manual_seed(2))


def expected_logprobs(model: PreTrainedModel) -> Tensor:
    """`[batch, seq]`: what transformers gives the next tokens."""
    tokens = sequences()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.float()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def batch() -> TrainingBatch:
    """The same tokens as a batch of ours."""
    tokens = sequences()
    num_rows, length = tokens.shape[0], tokens.shape[1] - 1
    return TrainingBatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        position_ids=torch.arange(length).repeat(num_rows, 1),
        response_mask=torch.ones(num_rows, length, dtype=torch.bool),
        behavior_logprobs=torch.zeros(num_rows, length),
        advantages=torch.zeros(num_rows),
    )


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face directory, shards or not."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def load_score_export(
    ranks: RankInfo, layouts: dict[str, dict[str, int]], source: Path, target: Path
) -> dict[str, list[list[float]]]:
    """In each layout: load each model of `source`, score the tokens, export to `target`.

    Returns log-probabilities by layout and model.
    """
    logprobs = {}
    for layout, sizes in layouts.items():
        parallel = ParallelConfig(
            tensor_model_parallel_size=sizes.get("tp", 1),
            pipeline_model_parallel_size=sizes.get("pp", 1),
            virtual_pipeline_model_parallel_size=sizes.get("vpp"),
        )
        context = initialize_parallel(parallel, ranks, seed=0)
        for case in CASES:
            hf_dir = source / str(case)
            architecture = read_architecture(hf_dir)
            policy = build_policy(architecture, ModelConfig(hf_path=str(hf_dir)), parallel, context)
            with torch.no_grad():
                for chunk in policy.chunks:
                    for parameter in chunk.parameters():
                        parameter.fill_(float("nan"))
            load_hf_weights(policy, hf_dir)
            scores = forward_logprobs(policy, batch(), micro_batch_size=1, temperature=1.0)
            logprobs[f"{layout}/{case}"] = scores.tolist()
            export_hf_weights(policy, target / layout / str(case))
            assert (target / layout / str(case) / "config.json").exists()
            # Rank 0 finds it; nobody may be left waiting for the others.
            with pytest.raises(UserError, match="not empty"):
                export_hf_weights(policy, target / layout / str(case))
        parallel_state.destroy_model_parallel()
    shutdown()
    return logprobs
