"""Hugging Face weights into a policy, and out of it, whatever its parallel layout.

Every rank reads its own parts of the files and nothing else. An export collects one tensor at a
time over the tensor-parallel ranks of its stage, sends it to rank 0, and rank 0 writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nested_reft_mcore.checkpoints.staging import (
    check_output_is_free,
    check_room,
)
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.config import hf_config
from nested_reft_mcore.hf.directory_writer import (
    DEFAULT_MAX_SHARD_BYTES,
    ShardPlan,
    ShardWriter,
    plan_shards,
    write_json,
)
from nested_reft_mcore.hf.families import weight_map
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.tensor_checks import check_tensors, some
from nested_reft_mcore.hf.tokenizer_files import (
    SpecialTokens,
    copy_tokenizer_files,
    special_tokens,
)
from nested_reft_mcore.hf.transforms import from_mcore, hf_part, pad_rows, to_mcore, tp_join
from nested_reft_mcore.hf.weight_map import MapEntry, WeightKind, WeightMap
from nested_reft_mcore.mcore.agreement import write_together
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.weights import named_parameters


def load_hf_weights(policy: Policy, hf_dir: Path) -> None:
    """Fill every parameter of this process from a Hugging Face directory.

    A stage's copy of tied embeddings is filled too; rows that pad the vocabulary become zero.
    Weights take the policy's dtype. The optimizer is made afterwards: it copies them.

    Raises:
        UserError: tensors are missing, unexpected or of another shape than the architecture's.
    """
    mapping = weight_map(policy.architecture)
    parameters = dict(named_parameters(policy))
    _check_parameters(policy, mapping, parameters)
    with SafetensorsReader(hf_dir) as reader, torch.no_grad():
        check_tensors(reader, mapping, policy.architecture, hf_dir)
        for name, parameter in parameters.items():
            parameter.copy_(_read_shard(policy, mapping.by_mcore_name[name], reader))


def export_hf_weights(
    policy: Policy,
    output_dir: Path,
    tokenizer_source: Path | None = None,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    force: bool = False,
) -> None:
    """Write the policy as a Hugging Face directory, of the policy's dtype. All ranks call this.

    Data-parallel replicas but the first only wait. The directory is there, whole, when the call
    returns on any rank.

    Args:
        policy: as it stands; what a plan skips is exported like everything else.
        output_dir: must not exist or be empty, unless `force`.
        tokenizer_source: directory or sentencepiece file whose tokenizer is copied.
        max_shard_bytes: a file holds no more, unless a single tensor does.
        force: replace a Hugging Face directory that is there.

    Raises:
        UserError: on every rank: `output_dir` is taken, there is no tokenizer in
            `tokenizer_source`, or the architecture has no Hugging Face layout.
    """
    mapping = weight_map(policy.architecture)
    policy.sync_parameters()
    context = policy.context
    plan = plan_shards(mapping.hf_shapes, policy.transformer_config.params_dtype, max_shard_bytes)

    def check() -> None:
        check_output_is_free(
            output_dir, marker="config.json", kind="Hugging Face directories", force=force
        )
        check_room(output_dir, plan.num_bytes)

    def write(directory: Path) -> None:
        if context.is_main:
            write_configs(directory, policy.architecture, plan.dtype, tokenizer_source)
        if context.data.rank == 0:
            _export_tensors(policy, mapping, directory, plan)

    write_together(
        output_dir,
        context,
        check=check,
        write=write,
        finish=lambda directory, _: plan.finish(directory),
    )


def write_configs(
    directory: Path,
    architecture: ModelArchitecture,
    dtype: torch.dtype,
    tokenizer_source: Path | None,
) -> None:
    """Write `config.json`, and tokenizer and generation config where there is a tokenizer.

    Raises:
        UserError: the architecture has no Hugging Face layout, or there is no tokenizer there.
    """
    name = str(dtype).removeprefix("torch.")
    tokens = SpecialTokens() if tokenizer_source is None else special_tokens(tokenizer_source)
    write_json(directory / "config.json", hf_config(architecture, dtype=name, **asdict(tokens)))
    if tokenizer_source is not None:
        copy_tokenizer_files(tokenizer_source, directory)


def _export_tensors(policy: Policy, mapping: WeightMap, directory: Path, plan: ShardPlan) -> None:
    parameters = dict(named_parameters(policy))
    with ShardWriter(directory, plan) as writer:
        for entry in mapping.entries:
            full = _full_tensor(policy, entry, parameters)
            if policy.context.is_main and full is not None:
                parts = from_mcore(entry.kind, full, policy.architecture)
                for tensor, part in zip(entry.tensors, parts, strict=True):
                    writer.add(tensor.name, part)


def _read_shard(policy: Policy, entry: MapEntry, reader: SafetensorsReader) -> Tensor:
    """This rank's part of one parameter, padding included, on the CPU."""
    tensor = policy.context.tensor
    padded = policy.padded_vocab_size
    parts = [
        reader.read(one.name, hf_part(entry.kind, shape, tensor.rank, tensor.size, padded))
        for one in entry.tensors
        for shape in (one.shape(policy.architecture),)
    ]
    shard = to_mcore(entry.kind, parts, policy.architecture)
    return pad_rows(shard, padded // tensor.size) if entry.kind is WeightKind.VOCAB else shard


def _full_tensor(policy: Policy, entry: MapEntry, parameters: dict[str, Tensor]) -> Tensor | None:
    """The full tensor of an entry on rank 0; None elsewhere."""
    context = policy.context
    stage = _stage_of(policy, entry)
    full = None
    if context.pipeline.rank == stage:
        (parameter,) = [parameters[name] for name in entry.mcore_names if name in parameters]
        full = _join_over_tensor_ranks(policy, entry, parameter.detach())
    # Rank 0 is the first tensor-parallel rank of the first stage, in the first replica.
    if stage == 0:
        return full
    if full is not None:
        dist.send(full.contiguous(), context.pipeline.ranks[0], group=context.pipeline.group)
    elif context.is_main:
        received = torch.empty(
            entry.full_shape(policy.architecture),
            dtype=policy.transformer_config.params_dtype,
            device=context.device,
        )
        dist.recv(received, context.pipeline.ranks[stage], group=context.pipeline.group)
        return received
    return None


def _join_over_tensor_ranks(policy: Policy, entry: MapEntry, shard: Tensor) -> Tensor | None:
    """The full tensor on the first tensor-parallel rank; None on the others."""
    tensor = policy.context.tensor
    vocab_size = policy.architecture.vocab_size
    if tensor.size == 1 or entry.kind is WeightKind.REPLICATED:
        is_first = tensor.rank == 0
        return tp_join(entry.kind, [shard], vocab_size) if is_first else None
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in tensor.ranks] if tensor.rank == 0 else None
    dist.gather(shard, shards, dst=tensor.ranks[0], group=tensor.group)
    return tp_join(entry.kind, shards, vocab_size) if shards is not None else None


def _stage_of(policy: Policy, entry: MapEntry) -> int:
    """The pipeline rank whose parameter an export takes."""
    if entry.layer is not None:
        return policy.stage_of_layer[entry.layer]
    is_embedding = entry.mcore_names[0].startswith("embedding.")
    return 0 if is_embedding else policy.context.pipeline.size - 1


def _check_parameters(policy: Policy, mapping: WeightMap, names: Iterable[str]) -> None:
    """Every parameter here has an entry, and every entry of this stage has a parameter here."""
    here = set(names)
    unknown = sorted(here - mapping.by_mcore_name.keys())
    absent = [
        entry.mcore_names[0]
        for entry in mapping.entries
        if _stage_of(policy, entry) == policy.context.pipeline.rank
        and here.isdisjoint(entry.mcore_names)
    ]
    if unknown or absent:
        raise UserError(
            f"model.architecture: the Hugging Face layout of family {policy.architecture.family!r} "
            f"does not fit it: {some('without a tensor there: ', unknown)}"
            f"{some('without a parameter here: ', absent)}"
        )
