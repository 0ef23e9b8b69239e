"""What a configuration asks of each replica in a step: sequences, micro-batches, slots."""

from __future__ import annotations

from dataclasses import dataclass

from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.hardware import Assumptions
from nested_reft_mcore.planning.layer_costs import ActivationShape, Kernels
from nested_reft_mcore.planning.layout import Layout

MOST_SLOTS = 256
"""As `rollout.memory`, which this room does not import: a test holds them equal."""
ITEMSIZE = {"float32": 4, "bfloat16": 2}
_CHUNK_BYTES = 2**27
"""As `mcore.logprobs`: room for a chunk of float32 logits; a test holds them equal."""


@dataclass(frozen=True)
class Workload:
    """Sizes of a step, of one replica."""

    num_prompts: int
    num_sequences: int
    """Completions, all samples of all prompts."""
    longest: int
    """Tokens of the longest sequence that goes into the model."""
    shape: ActivationShape
    """The largest micro-batch."""
    num_micro_batches: int
    """Of an update, if all sequences are as long as may be."""
    chunk_tokens: int
    """Tokens whose logits exist at the same time."""
    wanted_slots: int
    """Sequences that would be decoded together if memory were no matter."""
    slot_length: int
    """Positions of a slot."""


def mean_response(config: Config, assumed: Assumptions) -> float:
    """Tokens of a mean response: a share of the limit, all where ends of sequence are ignored."""
    limit = config.rollout.max_new_tokens
    return float(limit) if config.rollout.ignore_eos else assumed.response_fill * limit


def workload_of(config: Config, layout: Layout, kernels: Kernels) -> Workload:
    """Sizes of a step of `train`, for prompts and responses as long as the options allow."""
    rollout, train = config.rollout, config.train
    prompts = rollout.prompts_per_step // layout.data
    sequences = prompts * rollout.group_size
    per_update = max(1, sequences // train.updates_per_step)
    multiple = layout.tensor if layout.sequence_parallel else 1
    tokens = config.data.max_prompt_length + rollout.max_new_tokens - 1
    longest = -(-tokens // multiple) * multiple
    rows = min(train.micro_batch_size, per_update)
    most = rows * longest
    if train.max_tokens_per_micro_batch is not None:
        rows = min(max(1, train.max_tokens_per_micro_batch // longest), per_update)
        # Shorter sequences fill it up to the last token.
        most = min(train.max_tokens_per_micro_batch // multiple * multiple, per_update * longest)
    count = -(-per_update // rows)
    if layout.num_chunks > 1:
        # The interleaved schedule wants a multiple of the number of stages.
        count += -count % layout.pipeline
    drafted = rollout.max_draft_tokens if rollout.mode == "speculative" else 0
    chunk = train.logprob_chunk_tokens or max(1, _CHUNK_BYTES // (4 * layout.vocab_rows))
    return Workload(
        num_prompts=prompts,
        num_sequences=sequences,
        longest=longest,
        shape=ActivationShape(
            tokens=most,
            length=longest,
            itemsize=ITEMSIZE[config.model.dtype],
            sequence_shards=layout.tensor if layout.sequence_parallel else 1,
            kernels=kernels,
        ),
        num_micro_batches=count,
        chunk_tokens=min(chunk, most),
        wanted_slots=min(sequences, rollout.max_slots or MOST_SLOTS),
        slot_length=tokens + drafted,
    )
