"""How long a step's generation takes under a skip plan.

With several pipeline stages as many slot groups are under way. A round gives every sequence a
token: each stage takes the passes of all groups, and each group goes through all stages. Whichever
takes longer sets the pace, mostly the fullest stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.expected_step import ExpectedStep, expected_step
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layer_costs import (
    forward_operations,
    kv_bytes_per_token,
    parts_run,
    score_operations,
)
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.links import pipeline_link, ring_share, tensor_link
from nested_reft_mcore.planning.product_rate import DecodeProducts
from nested_reft_mcore.planning.workload import ITEMSIZE, Workload


@dataclass(frozen=True)
class PassLoad:
    """What one pass of a slot group holds: numbers, or arrays of one shape for many passes."""

    rows: Any
    """Sequences that decode, which may be a mean."""
    keys: Any
    """Places that all of these rows look at, together."""
    piece_tokens: Any = 0.0
    """Tokens of prompts that are written into the cache in the same pass."""
    piece_pairs: Any = 0.0
    """Places that each of these looks at, summed."""
    width: int = 1
    """Tokens of each row."""

    @property
    def tokens(self) -> Any:
        """All of them."""
        return self.rows * self.width + self.piece_tokens


class DecodeModel:
    """Seconds of one step's generation, for any plan."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        workload: Workload,
        hardware: HardwareProfile,
        slots: int,
        expected: ExpectedStep | None = None,
    ) -> None:
        """`hardware` is what a process has while all work; `expected` are lengths, where known."""
        assumed = hardware.assumptions
        self._rollout = config.rollout
        self._layout = layout
        self._hardware = hardware
        self._assumed = assumed
        self._itemsize = ITEMSIZE[config.model.dtype]
        self._products = DecodeProducts(hardware, self._itemsize)
        self._bandwidth = hardware.memory_gb_per_s * 1e9 * assumed.decode_efficiency
        if expected is None:
            expected = expected_step(config, layout, workload, assumed, slots)
        self._rounds = expected.rounds
        self._layers = [layout.layers_of(stage) for stage in range(layout.pipeline)]

    def seconds(self, plan: LayerSkipPlan) -> float:
        """Of all rounds: pieces of prompts, then tokens until the last completion ends.

        In lossless mode `plan` drafts and the full policy verifies (arXiv 2211.17192): of drafts
        of n tokens, each taken with probability a, (1 - a^(n+1)) / (1 - a) tokens come.
        """
        full = LayerSkipPlan.full(plan.num_layers)
        if self._rollout.mode == "full":
            plan = full
        if self._rollout.mode != "speculative":
            return self.plain_seconds(plan)
        drafted, rate = self._rollout.max_draft_tokens, self._assumed.accept_rate
        taken = (1 - rate ** (drafted + 1)) / (1 - rate)
        loads = self._loads()
        # Prompts are written by the full policy alone, once.
        plain = PassLoad(loads.rows, loads.keys)
        cycle = drafted * self._round_seconds(plan, plain)
        cycle = cycle + self._round_seconds(
            full, PassLoad(loads.rows, loads.keys, width=1 + drafted)
        )
        writing = self._round_seconds(full, loads) - self._round_seconds(full, plain)
        return float((self._rounds.count * (cycle / taken + writing)).sum())

    def plain_seconds(self, plan: LayerSkipPlan) -> float:
        """The same without drafts: the policy under `plan` writes every token."""
        return float((self._rounds.count * self._round_seconds(plan, self._loads())).sum())

    def parts_seconds(self, attentions: int, mlps: int, load: PassLoad) -> Any:
        """One pass through so many attentions and MLPs; numbers or arrays, as `load` has them.

        Weights are read once for all rows and prompt pieces of the pass; keys and values of rows
        are read for each row.
        """
        layer, tokens = self._layout.layer, load.tokens
        attention, mlp = forward_operations(layer, tokens, 0)
        pairs = load.keys * load.width + load.piece_pairs
        attention = attention + score_operations(layer, pairs)
        cache = load.keys * kv_bytes_per_token(layer, self._itemsize)
        seconds = attentions * self._read_or_compute(
            layer.attention_parameters, attention, tokens, cache
        )
        seconds += mlps * self._read_or_compute(layer.mlp_parameters, mlp, tokens)
        # Half of a layer's overhead, and one of its two sums over shards, for each part.
        overhead = self._assumed.layer_overhead_us / 2 * 1e-6
        return seconds + (attentions + mlps) * (overhead + self._sum_seconds(tokens))

    def fixed_seconds(self, load: PassLoad) -> Any:
        """What a pass takes on a stage apart from layers, head and waiting; numbers or arrays."""
        assumed = self._assumed
        fixed = assumed.pass_overhead_us
        if self._layout.pipeline > 1:
            fixed += assumed.message_overhead_us
        return (fixed + load.rows * assumed.row_overhead_us) * 1e-6

    def rows_head_seconds(self, tokens: Any) -> Any:
        """Logits of so many tokens; numbers or arrays."""
        matrix = self._layout.vocab_matrix
        return self._read_or_compute(matrix, 2 * tokens * matrix, tokens)

    def message_seconds(self, tokens: Any) -> Any:
        """Hidden states of so many tokens to the next stage; numbers or arrays."""
        size = tokens * self._layout.layer.hidden * self._itemsize
        latency = self._assumed.message_latency_us * 1e-6
        return latency + size / pipeline_link(self._layout, self._hardware)

    def head_cost(self) -> float:
        """The head over a layer, at the mean rows of a pass: what `nested.head_cost` wants."""
        rounds = self._rounds
        weights = rounds.count[:, None] * (rounds.rows > 0)
        total = max(1, int(weights.sum()))
        rows, keys = ((weights * n).sum() / total for n in (rounds.rows, rounds.keys))
        layer = self.parts_seconds(1, 1, PassLoad(float(rows), float(keys)))
        return float(self.rows_head_seconds(float(rows)) / layer)

    def _loads(self) -> PassLoad:
        """What each pass holds, `[stretches, lanes]`."""
        rounds = self._rounds
        return PassLoad(rounds.rows, rounds.keys, rounds.piece_tokens, rounds.piece_pairs)

    def _round_seconds(self, plan: LayerSkipPlan, load: PassLoad) -> NDArray[np.float64]:
        """One round of each stretch: a token, or `load.width`, for every sequence under way."""
        stages, is_active = self._layout.pipeline, load.tokens > 0
        passes = np.stack([self._stage_seconds(plan, stage, load) for stage in range(stages)])
        passes = np.where(is_active, passes, 0.0)
        of_stage, of_group = passes.sum(axis=2).max(axis=0), passes.sum(axis=0)
        if stages > 1:
            messages = stages * self._layout.num_chunks * self.message_seconds(load.tokens)
            of_group = of_group + np.where(is_active, messages, 0.0)
        return np.maximum(of_stage, of_group.max(axis=1))

    def _stage_seconds(
        self, plan: LayerSkipPlan, stage: int, load: PassLoad
    ) -> NDArray[np.float64]:
        """One pass of each slot group through one stage."""
        parts = parts_run(plan, self._layers[stage])
        seconds = self.fixed_seconds(load) + self.parts_seconds(*parts, load)
        if self._layout.is_last(stage):
            # Where all rows wait for their prompt there is nothing to sample.
            head = self.rows_head_seconds(load.rows * load.width)
            seconds = seconds + np.where(load.rows > 0, head, 0.0)
        return seconds

    def _sum_seconds(self, tokens: Any) -> Any:
        """The sum over tensor-parallel shards after an attention or an MLP."""
        shards = self._layout.tensor
        if shards == 1:
            return 0.0
        size = tokens * self._layout.layer.hidden * self._itemsize * ring_share(shards)
        latency = self._assumed.all_reduce_latency_us * 1e-6
        return latency + size / tensor_link(self._layout, self._hardware)

    def _read_or_compute(
        self, parameters: int, operations: Any, tokens: Any, cache: Any = 0.0
    ) -> Any:
        moved = parameters * self._itemsize + cache
        return np.maximum(moved / self._bandwidth, self._products.seconds(operations, tokens))
