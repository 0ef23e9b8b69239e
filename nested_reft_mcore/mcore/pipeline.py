"""Forward and backward passes of a batch through every pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import from_last_stage
from nested_reft_mcore.mcore.logprobs import token_logprobs
from nested_reft_mcore.mcore.micro_batches import (
    MicroBatches,
    equal_micro_batches,
    filled_micro_batches,
)
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.output_layer import hidden_states_out, output_weight
from nested_reft_mcore.mcore.variable_lengths import variable_lengths
from nested_reft_mcore.rollout.batch import TrainingBatch

Value = TypeVar("Value")
LossFunction = Callable[[Tensor, Tensor, TrainingBatch], tuple[Tensor, Tensor, Any]]
"""(log-probs, entropies, micro-batch) to (loss sum, number of tokens, anything to hand back)."""


@dataclass(frozen=True)
class PassResult:
    """What a pass over this replica's batch gave."""

    logprobs: Tensor
    """`[batch, seq]` float32 on the CPU, on every stage: of the labels that the mask of responses
    names, before the update; 0 elsewhere."""
    entropies: Tensor
    """`[batch, seq]` float32 on the CPU, on every stage; 0 outside the mask."""
    outputs: list[Any]
    """What the loss function handed back for each micro-batch; empty but on the last stage."""
    num_tokens: int
    """Of this replica's micro-batches, up to the last that counts in each row."""
    num_places: int
    """Of this replica's micro-batches, padding included."""


def forward_logprobs(
    policy: Policy,
    batch: TrainingBatch,
    *,
    micro_batch_size: int,
    temperature: float,
    max_tokens_per_micro_batch: int | None = None,
    logprob_chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probabilities of the labels under the policy as it stands, nested or not.

    The options are those of `run_batch`.

    Returns:
        `[batch, seq]` float32 on the CPU, on every rank of the pipeline; 0 outside the mask.
    """

    def no_loss(logprobs: Tensor, _entropies: Tensor, _batch: TrainingBatch) -> Any:
        return logprobs.sum(), torch.ones((), dtype=torch.int, device=logprobs.device), None

    return run_batch(
        policy,
        batch,
        no_loss,
        micro_batch_size=micro_batch_size,
        temperature=temperature,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        logprob_chunk_tokens=logprob_chunk_tokens,
        forward_only=True,
    ).logprobs


def forward_logits(policy: Policy, tokens: Tensor) -> Tensor | None:
    """Logits of the policy as it stands, for comparisons: everybody gathers the vocabulary.

    Args:
        policy: Without virtual pipeline stages.
        tokens: `[batch, seq]` int64; the same on every process.

    Returns:
        `[batch, seq, vocab]` float32 on the CPU on rank 0; None on other processes.
    """
    context = policy.context
    collected: list[Tensor] = []

    def keep(logits: Tensor) -> tuple[Tensor, Tensor, None]:
        collected.append(logits.float().contiguous())
        return logits.sum(), torch.ones((), dtype=torch.int, device=logits.device), None

    def forward_step(_batches: Any, chunk: Any) -> tuple[Tensor, Any]:
        positions = torch.arange(tokens.shape[1], device=context.device).expand_as(tokens)
        return chunk(tokens.to(context.device), positions, None), keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([None]),
            model=policy.modules,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
        )
    width = policy.padded_vocab_size // context.tensor.size
    shard = torch.zeros((*tokens.shape, width), dtype=torch.float32, device=context.device)
    shard = from_last_stage(collected[0] if collected else shard, context)
    shards = [shard]
    if context.tensor.group is not None:
        shards = [torch.empty_like(shard) for _ in context.tensor.ranks]
        dist.all_gather(shards, shard, group=context.tensor.group)
    if not context.is_main:
        return None
    return torch.cat(shards, dim=-1)[..., : policy.architecture.vocab_size].cpu()


def run_batch(
    policy: Policy,
    batch: TrainingBatch,
    loss: LossFunction,
    *,
    micro_batch_size: int,
    temperature: float,
    forward_only: bool = False,
    max_tokens_per_micro_batch: int | None = None,
    logprob_chunk_tokens: int | None = None,
) -> PassResult:
    """Run Megatron's pipeline schedule over the micro-batches of `batch`.

    Gradients are those of (sum of losses) / (sum of token counts), both over all micro-batches and
    data-parallel replicas: Megatron divides once, at the end of the backward pass.

    Args:
        policy: Runs as it stands, nested or not.
        batch: This replica's sequences.
        loss: Called on the last stage for each micro-batch.
        micro_batch_size: Sequences in one forward pass.
        temperature: Of the log-probabilities.
        forward_only: Leave the backward pass out.
        max_tokens_per_micro_batch: Fill micro-batches with sequences of like length up to so many
            tokens instead, padding included; replicas exchange sequences to have as much to do.
            The loss then sees those of other replicas.
        logprob_chunk_tokens: Tokens whose logits exist at the same time (`token_logprobs`).

    Raises:
        UserError: a sequence is longer than `max_tokens_per_micro_batch`.
    """
    context, config = policy.context, policy.transformer_config
    made = _micro_batches(policy, batch, micro_batch_size, max_tokens_per_micro_batch)
    collected: list[tuple[Tensor, Tensor]] = []

    def loss_of(micro_batch: TrainingBatch, hidden: Tensor) -> tuple[Any, ...]:
        logprobs, entropies = token_logprobs(
            hidden.transpose(0, 1),
            output_weight(policy.chunks[-1]),
            micro_batch.labels,
            micro_batch.response_mask,
            temperature=temperature,
            vocab_size=policy.architecture.vocab_size,
            tensor=context.tensor,
            sequence_parallel=config.sequence_parallel,
            chunk_tokens=logprob_chunk_tokens,
        )
        collected.append((logprobs.detach(), entropies.detach()))
        loss_sum, num_tokens, output = loss(logprobs, entropies, micro_batch)
        return loss_sum, num_tokens.to(torch.int), output

    with hidden_states_out(policy.chunks):
        outputs = run_schedule(policy, made, loss_of, forward_only=forward_only)
    columns = list(zip(*collected, strict=True)) or [(), ()]
    logprobs, entropies = made.gather(columns, context)
    if not context.is_last_stage:
        outputs = []
    return PassResult(logprobs, entropies, outputs, made.num_tokens, made.num_places)


def _micro_batches(
    policy: Policy, batch: TrainingBatch, micro_batch_size: int, max_tokens: int | None
) -> MicroBatches:
    """Those of `micro_batch_size` rows, or those of at most `max_tokens` places."""
    context = policy.context
    if max_tokens is None:
        return equal_micro_batches(batch, micro_batch_size, context)
    is_cut = policy.transformer_config.sequence_parallel
    return filled_micro_batches(batch, max_tokens, context.tensor.size if is_cut else 1, context)


def run_schedule(
    policy: Policy,
    made: MicroBatches,
    loss: Callable[[TrainingBatch, Tensor], tuple[Any, ...]],
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule over micro-batches; what `loss` hands back for each, on the last stage.

    `loss` makes of a micro-batch and the model's output, logits `[batch, seq, vocab_local]` or what
    `hidden_states_out` puts in their place, the three values that Megatron wants of a loss.
    """

    def forward_step(batches: Iterator[TrainingBatch], chunk: Any) -> tuple[Tensor, Any]:
        micro_batch = next(batches).to(policy.context.device)
        output = chunk(micro_batch.tokens, micro_batch.position_ids, None)
        return output, partial(loss, micro_batch)

    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(not forward_only))
        options: dict[str, Any] = {}
        if made.has_variable_lengths:
            options = stack.enter_context(variable_lengths(policy))
        rows, length = made.batches[0].tokens.shape
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(made.batches) for _ in policy.modules],
            model=policy.modules,
            num_microbatches=len(made.batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
            **options,
        )
    return outputs


def broadcast_object(value: Value, context: ParallelContext) -> Value:
    """Give every pipeline stage the last one's object."""
    if context.pipeline.group is None:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(
        box, src=context.pipeline.ranks[-1], group=context.pipeline.group, device=context.device
    )
    return box[0]
