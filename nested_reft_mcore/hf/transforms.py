"""Pure functions between Hugging Face's tensors, Megatron's full tensors and their shards.

A *full* Megatron tensor is neither cut nor padded. For every kind and every `tp_size` that divides
the key-value groups and the widths:

- `from_mcore(kind, to_mcore(kind, tensors, architecture), architecture)` gives `tensors` back;
- `tp_join` of the shards that `tp_slice` makes gives the full tensor back;
- `to_mcore` of the parts that `hf_part` names is the shard that `tp_slice` makes, but for padding:
  so a rank reads its own part of a file and nothing else.

All are permutations of elements: no value changes, whatever the dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.hf.weight_map import WeightKind

VOCAB_DIVISOR = 128


@dataclass(frozen=True)
class TensorPart:
    """Rows or columns `start` to `stop` (exclusive) along `dim`."""

    dim: int
    start: int
    stop: int


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of Megatron's embedding: the next multiple of 128 * tp_size."""
    divisor = VOCAB_DIVISOR * tp_size
    return -(-vocab_size // divisor) * divisor


def to_mcore(
    kind: WeightKind, tensors: Sequence[Tensor], architecture: ModelArchitecture
) -> Tensor:
    """Combine Hugging Face tensors into the full Megatron tensor.

    Args:
        kind: how.
        tensors: in the order of the entry's `tensors`. Matrices are `[out, in]`, biases `[out]`.
            Also takes the parts that one tensor-parallel rank holds.
        architecture: its head size and heads per group lay out query, key and value.

    Returns:
        `[sum of out, in]` or `[sum of out]`, of the dtype of `tensors`.
    """
    if kind is WeightKind.QKV:
        query, key, value = tensors
        rest = key.shape[1:]
        groups = key.shape[0] // architecture.head_dim
        grouped = [part.reshape(groups, -1, *rest) for part in (query, key, value)]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)
    if kind is WeightKind.GATE_UP:
        gate, up = tensors
        return torch.cat((gate, up), dim=0)
    (tensor,) = tensors
    return tensor


def from_mcore(
    kind: WeightKind, tensor: Tensor, architecture: ModelArchitecture
) -> tuple[Tensor, ...]:
    """Take a full Megatron tensor apart: the inverse of `to_mcore`. Results are contiguous."""
    if kind is WeightKind.QKV:
        head_dim = architecture.head_dim
        heads_per_group = architecture.num_attention_heads // architecture.num_query_groups
        rest = tensor.shape[1:]
        grouped = tensor.reshape(-1, (heads_per_group + 2) * head_dim, *rest)
        sizes = (heads_per_group * head_dim, head_dim, head_dim)
        return tuple(part.reshape(-1, *rest).contiguous() for part in grouped.split(sizes, dim=1))
    if kind is WeightKind.GATE_UP:
        gate, up = tensor.chunk(2, dim=0)
        return gate.contiguous(), up.contiguous()
    return (tensor,)


def tp_slice(
    kind: WeightKind, full: Tensor, tp_rank: int, tp_size: int, padded_vocab: int
) -> Tensor:
    """The part of a full Megatron tensor that tensor-parallel rank `tp_rank` of `tp_size` holds.

    `padded_vocab` is the number of rows that a `VOCAB` tensor gets before it is cut; other kinds
    ignore it. Padding is zero.
    """
    if kind is WeightKind.REPLICATED:
        return full
    if kind is WeightKind.ROW_PARALLEL:
        return _part(full, 1, tp_rank, tp_size)
    if kind is WeightKind.GATE_UP:
        halves = [_part(half, 0, tp_rank, tp_size) for half in full.chunk(2, dim=0)]
        return torch.cat(halves, dim=0)
    if kind is WeightKind.VOCAB:
        full = pad_rows(full, padded_vocab)
    return _part(full, 0, tp_rank, tp_size)


def tp_join(kind: WeightKind, shards: Sequence[Tensor], vocab_size: int) -> Tensor:
    """The full Megatron tensor that `shards`, in rank order, make: the inverse of `tp_slice`."""
    if kind is WeightKind.REPLICATED:
        return shards[0]
    if kind is WeightKind.ROW_PARALLEL:
        return torch.cat(tuple(shards), dim=1)
    if kind is WeightKind.GATE_UP:
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim=0)
    full = torch.cat(tuple(shards), dim=0)
    return full[:vocab_size] if kind is WeightKind.VOCAB else full


def hf_part(
    kind: WeightKind, shape: Sequence[int], tp_rank: int, tp_size: int, padded_vocab: int
) -> TensorPart | None:
    """What rank `tp_rank` of `tp_size` reads of one Hugging Face tensor of this `shape`.

    None means the whole tensor. A `VOCAB` part ends where the real rows end, and may be empty.

    Raises:
        ValueError: `tp_size` does not divide the dimension.
    """
    if kind is WeightKind.REPLICATED:
        return None
    dim = 1 if kind is WeightKind.ROW_PARALLEL else 0
    size = padded_vocab if kind is WeightKind.VOCAB else shape[dim]
    start, stop = _bounds(size, tp_rank, tp_size)
    return TensorPart(dim, min(start, shape[dim]), min(stop, shape[dim]))


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """`tensor` with rows of zeros below it, `num_rows` in all."""
    missing = num_rows - tensor.shape[0]
    if missing < 0:
        raise ValueError(f"cannot pad {tensor.shape[0]} rows to {num_rows}")
    if missing == 0:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])), dim=0)


def _part(tensor: Tensor, dim: int, tp_rank: int, tp_size: int) -> Tensor:
    start, stop = _bounds(tensor.shape[dim], tp_rank, tp_size)
    return tensor.narrow(dim, start, stop - start)


def _bounds(size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    if size % tp_size:
        raise ValueError(f"tensor-parallel size {tp_size} does not divide {size}")
    part = size // tp_size
    return tp_rank * part, (tp_rank + 1) * part
