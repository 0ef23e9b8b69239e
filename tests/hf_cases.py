"""Tiny random Hugging Face models, and what one process of a layout makes of them."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import HfToMcoreOptions, McoreToHfOptions
from nested_reft_mcore.config.schema import ModelConfig, ParallelConfig
from nested_reft_mcore.hf.config import read_architecture
from nested_reft_mcore.hf.families import FAMILIES
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.checkpoint import load_weights, save_weights
from nested_reft_mcore.mcore.hf_weights import export_hf_weights, load_hf_weights
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.micro_batches import equal_micro_batches
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.pipeline import forward_logprobs, run_schedule
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.training.conversion import hf_to_mcore, mcore_to_hf

VOCAB_SIZE = 41
NUM_LAYERS = 4


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.25,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 48,
}
"""Of six wavelengths from 6 to 1117 the first stays, the second is mixed, the others stretch."""


@dataclass(frozen=True)
class HfCase:
    """One model: its family, whether its output layer has weights of its own, its RoPE."""

    family: str
    untied: bool
    scaled_rope: bool = False

    def __str__(self) -> str:
        scaling = "-llama3rope" if self.scaled_rope else ""
        return f"{self.family}{scaling}-{'untied' if self.untied else 'tied'}"

    @property
    def vocab_size(self) -> int:
        """41 fits the first of two tensor-parallel ranks; 1003 spreads over all."""
        return 1003 if self.untied else VOCAB_SIZE


CASES = (
    *(HfCase(family, untied) for family in FAMILIES for untied in (False, True)),
    *(HfCase("llama", untied, scaled_rope=True) for untied in (False, True)),
)

# One of each kind of attention, tied and untied.
CHECKPOINT_CASES = (
    HfCase("llama", untied=True, scaled_rope=True),
    HfCase("qwen2", untied=False),
    HfCase("qwen3", untied=True),
)


def write_model(
    case: HfCase, directory: Path, dtype: torch.dtype = torch.float32, **save_options: Any
) -> PreTrainedModel:
    """Save a model all of whose parameters are random: grouped queries, heads wider than usual."""
    rope = LLAMA3_ROPE if case.scaled_rope else {"rope_type": "default"}
    shape: dict[str, Any] = {
        "vocab_size": case.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_parameters": {**rope, "rope_theta": 500.0},
        "tie_word_embeddings": not case.untied,
        "bos_token_id": None,
        "eos_token_id": 7,
    }
    config = AutoConfig.for_model(case.family, **shape, **FAMILIES[case.family].extra_keys)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + values if "norm" in name else values)
    model.save_pretrained(directory, **save_options)
    return model


def sequences(case: HfCase) -> Tensor:
    """`[batch, seq + 1]` token ids of the whole vocabulary."""
    return torch.randint(0, case.vocab_size, (2, 13), generator=torch.Generator().manual_seed(2))


def expected_logits(model: PreTrainedModel, case: HfCase) -> Tensor:
    """`[batch, seq, vocab]` of transformers, float32."""
    with torch.no_grad():
        return model(sequences(case)[:, :-1]).logits.float()


def expected_logprobs(model: PreTrainedModel, case: HfCase) -> Tensor:
    """`[batch, seq]`: what transformers gives the next tokens."""
    logprobs = expected_logits(model, case).log_softmax(-1)
    return logprobs.gather(-1, sequences(case)[:, 1:, None])[..., 0]


def batch(case: HfCase) -> TrainingBatch:
    """The same tokens as a batch of ours."""
    tokens = sequences(case)
    num_rows, length = tokens.shape[0], tokens.shape[1] - 1
    return TrainingBatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        position_ids=torch.arange(length).repeat(num_rows, 1),
        response_mask=torch.ones(num_rows, length, dtype=torch.bool),
        behavior_logprobs=torch.zeros(num_rows, length),
        advantages=torch.zeros(num_rows),
    )


def pipelined_scores(policy: Policy, case: HfCase) -> tuple[np.ndarray, np.ndarray | None]:
    """What Megatron's schedule gives: log-probs `[batch, seq]`, and on the first tensor-parallel
    rank of the last stage the logits `[batch, seq, vocab]` before anything is done with them."""
    shards: list[Tensor] = []

    def keep(_batch: TrainingBatch, logits: Tensor) -> tuple[Tensor, Tensor, None]:
        shards.append(logits)
        return logits.sum(), torch.ones((), dtype=torch.int), None

    tensor = policy.context.tensor
    logprobs = forward_logprobs(policy, batch(case), micro_batch_size=1, temperature=1.0)
    rows = equal_micro_batches(batch(case), 1, policy.context)
    run_schedule(policy, rows, keep, forward_only=True)
    if not policy.context.is_last_stage:
        return logprobs.numpy(), None
    logits = torch.cat(shards).contiguous()
    if tensor.group is not None:
        parts = [torch.empty_like(logits) for _ in tensor.ranks] if tensor.rank == 0 else None
        dist.gather(logits, parts, dst=tensor.ranks[0], group=tensor.group)
        if parts is None:
            return logprobs.numpy(), None
        logits = torch.cat(parts, dim=-1)
    return logprobs.numpy(), logits[..., : case.vocab_size].numpy()


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face directory, shards or not."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def load_score_export(
    ranks: RankInfo, layouts: dict[str, dict[str, int]], source: Path, target: Path
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """In each layout: load each model of `source`, score the tokens, export to `target`.

    Returns `pipelined_scores` by layout and model.
    """
    scores = {}
    for layout, sizes in layouts.items():
        parallel = ParallelConfig(
            tensor_model_parallel_size=sizes.get("tp", 1),
            pipeline_model_parallel_size=sizes.get("pp", 1),
            virtual_pipeline_model_parallel_size=sizes.get("vpp"),
            sequence_parallel=bool(sizes.get("sp")),
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
            read = load_and_count(policy, hf_dir)
            assert 0 < read <= sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
            scores[f"{layout}/{case}"] = pipelined_scores(policy, case)
            export_hf_weights(policy, target / layout / str(case))
            assert (target / layout / str(case) / "config.json").exists()
            # Rank 0 finds it; nobody may be left waiting for the others.
            with pytest.raises(UserError, match="not empty"):
                export_hf_weights(policy, target / layout / str(case))
            if case in CHECKPOINT_CASES:
                pass_through_checkpoints(policy, parallel, hf_dir, target / layout, str(case))
        fail_on_the_last_rank(context, source / str(CASES[0]), target / layout)
        parallel_state.destroy_model_parallel()
    shutdown()
    return scores


def load_and_count(policy: Policy, hf_dir: Path) -> int:
    """Load, and say how many values this process has read: its own slices and no others."""
    counts = [0]
    read = SafetensorsReader.read

    def counting(self: SafetensorsReader, *arguments: Any) -> Tensor:
        values = read(self, *arguments)
        counts[0] += values.numel()
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsReader, "read", counting)
        load_hf_weights(policy, hf_dir)
    return counts[0]


def pass_through_checkpoints(
    policy: Policy, parallel: ParallelConfig, hf_dir: Path, target: Path, name: str
) -> None:
    """To Hugging Face by way of a converted checkpoint, and of one that Megatron has written."""
    loaded = [parameter.clone() for chunk in policy.chunks for parameter in chunk.parameters()]
    converted, saved = target / f"{name}.converted", target / f"{name}.saved"
    options = HfToMcoreOptions(hf=str(hf_dir), output=str(converted), parallel=parallel)
    assert hf_to_mcore(options, policy.context) == 0
    save_weights(policy, saved)
    for checkpoint in (converted, saved):
        with torch.no_grad():
            for chunk in policy.chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(float("nan"))
        load_weights(policy, checkpoint)
        found = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(found, loaded, strict=True))
        output = checkpoint.with_name(f"{checkpoint.name}.hf")
        back = McoreToHfOptions(checkpoint=str(checkpoint), output=str(output), parallel=parallel)
        assert mcore_to_hf(back, policy.context) == 0


@contextmanager
def small_files_only(num_bytes: int) -> Iterator[None]:
    """This process cannot write larger files for a while."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def fail_on_the_last_rank(context: ParallelContext, hf_dir: Path, target: Path) -> None:
    """All processes hear of what one of them could not write, and nothing is left."""
    is_last = context.rank == context.world_size - 1
    options = HfToMcoreOptions(hf=str(hf_dir), output=str(target / "full"))
    with (
        small_files_only(2_000) if is_last else nullcontext(),
        pytest.raises(UserError, match="full: cannot be written: File too large"),
    ):
        hf_to_mcore(options, context)
    # No process comes here before the first one has tidied up.
    assert not list(target.glob("*full*"))
