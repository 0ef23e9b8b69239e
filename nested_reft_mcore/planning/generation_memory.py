"""Keys and values for the slots, and what a pass of generation needs beside them."""

from __future__ import annotations

from dataclasses import dataclass

from nested_reft_mcore.algorithm.layer_skip import fewest_skipped_per_stage
from nested_reft_mcore.algorithm.skip_schedule import head_on_last_stage
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.layer_costs import FLOAT32, kv_bytes_per_token
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.workload import Workload

_SHARE_OF_FREE = 0.5
"""As `rollout.memory`, where `rollout.kv_cache_gb` is left out; a test holds them equal."""


@dataclass(frozen=True)
class CacheMemory:
    """Device bytes of one rank while it generates."""

    slots: int
    """Sequences decoded together; 0 where not one fits."""
    wanted_slots: int
    bytes_per_slot: int
    working: int
    """Activations of a pass and the logits of its rows."""

    @property
    def cache(self) -> int:
        """Keys and values; of one sequence where not even that fits."""
        return max(1, self.slots) * self.bytes_per_slot

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.working


def cache_memory(
    config: Config,
    layout: Layout,
    workload: Workload,
    stage: int,
    free: int,
    *,
    full_depth: bool = False,
) -> CacheMemory:
    """Slots as `rollout.memory` chooses them on a rank with `free` bytes, and what they take.

    The engine takes the least number of all ranks; `slots` here is this rank's own.
    """
    per_slot = slot_bytes(config, layout, workload.slot_length, stage, full_depth=full_depth)
    asked = config.rollout.kv_cache_gb
    room = int(free * _SHARE_OF_FREE) if asked is None else int(asked * 1e9)
    slots = min(workload.wanted_slots, room // per_slot) if per_slot else workload.wanted_slots
    working = _pass_bytes(config, layout, workload, max(1, slots))
    return CacheMemory(slots, workload.wanted_slots, per_slot, working)


def slot_bytes(
    config: Config, layout: Layout, length: int, stage: int, *, full_depth: bool = False
) -> int:
    """Keys and values of one sequence of `length` tokens on a rank of `stage`.

    Of all plans that the law may draw the one counts that leaves this stage most attention.
    """
    skipped = 0 if full_depth else fewest_attentions_skipped(config, layout)[stage]
    itemsize = 2 if config.model.dtype == "bfloat16" else FLOAT32
    attending = len(layout.layers_of(stage)) - skipped
    return attending * length * kv_bytes_per_token(layout.layer, itemsize)


def fewest_attentions_skipped(config: Config, layout: Layout) -> list[int]:
    """Attentions that every plan of the rollouts leaves out, of each stage.

    None in lossless mode, whose cache serves the full policy, and none that this model knows of
    under the law `sensitivity`, which draws from a measured pool.
    """
    nested = config.nested
    is_full = config.rollout.mode != "nested" or nested.part == "mlp"
    if is_full or nested.law == "sensitivity" or config.controller.metric != "none":
        # A controller may go down to skipping nothing.
        return [0] * layout.pipeline
    return fewest_skipped_per_stage(
        nested.law,
        layout.architecture.num_layers,
        num_skipped(nested, layout.architecture.num_layers),
        nested.border_layers,
        layout.stage_of_layer,
        nested.part,
        head_on_last_stage(nested.head_cost, layout.pipeline),
        nested.protected_layers,
    )


def _pass_bytes(config: Config, layout: Layout, workload: Workload, slots: int) -> int:
    """One pass: prompt pieces and rows through a layer, then logits of the rows and their draw."""
    layer, itemsize = layout.layer, workload.shape.itemsize
    rows = -(-slots // layout.pipeline)
    drafted = config.rollout.max_draft_tokens if config.rollout.mode == "speculative" else 0
    row_tokens = rows * (1 + drafted)
    tokens = max(config.rollout.max_num_batched_tokens, row_tokens)
    widest = 2 * layer.hidden + max(layer.qkv + 3 * layer.query, 4 * layer.ffn)
    logits = row_tokens * layout.vocab_rows * 3 * FLOAT32
    return tokens * widest * itemsize + logits
