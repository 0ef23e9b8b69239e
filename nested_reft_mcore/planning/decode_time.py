"""How long a step's generation takes under a skip plan.

With several pipeline stages as many slot groups are under way, and the fullest stage sets the pace:
a token for every slot takes as many of its passes as there are stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layer_costs import (
    FLOAT32,
    forward_operations,
    kv_bytes_per_token,
    parts_run,
    score_operations,
)
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.links import pipeline_link, ring_share, tensor_link
from nested_reft_mcore.planning.workload import ITEMSIZE, Workload, mean_response


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
    ) -> None:
        assumed = hardware.assumptions
        self._rollout = config.rollout
        self._layout = layout
        self._hardware = hardware
        self._workload = workload
        self._assumed = assumed
        self._itemsize = ITEMSIZE[config.model.dtype]
        is_wide = self._itemsize == FLOAT32
        peak = hardware.peak_tflops_float32 if is_wide else hardware.peak_tflops
        self._speed = peak * 1e12 * assumed.matmul_efficiency
        self._bandwidth = hardware.memory_gb_per_s * 1e9 * assumed.decode_efficiency
        self._prompt = assumed.prompt_fill * config.data.max_prompt_length
        self._response = mean_response(config, assumed)
        self._slots = max(1, slots)
        self._layers = [layout.layers_of(stage) for stage in range(layout.pipeline)]

    def seconds(self, plan: LayerSkipPlan) -> float:
        """Prompts, then tokens until the last completion ends.

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
        cycle = drafted * self.round_seconds(plan) + self.round_seconds(full, 1 + drafted)
        return self._prefill(full) + self._num_rounds() / taken * cycle

    def plain_seconds(self, plan: LayerSkipPlan) -> float:
        """The same without drafts: the policy under `plan` writes every token."""
        return self._prefill(plan) + self._num_rounds() * self.round_seconds(plan)

    def round_seconds(self, plan: LayerSkipPlan, width: int = 1) -> float:
        """One pass of all slot groups: a token, or `width`, for every sequence under way."""
        times = [self.stage_seconds(plan, stage, width) for stage in range(self._layout.pipeline)]
        return self._layout.pipeline * max(times)

    def stage_seconds(self, plan: LayerSkipPlan, stage: int, width: int = 1) -> float:
        """One pass of one slot group through one stage, at the mean of rows and contexts."""
        attentions, mlps = parts_run(plan, self._layers[stage])
        rows = self._rows()
        load = PassLoad(rows, rows * (self._prompt + self._response / 2), width=width)
        seconds = self.parts_seconds(attentions, mlps, load)
        if self._layout.is_last(stage):
            seconds += self.head_seconds(width)
        if self._layout.pipeline > 1:
            seconds += self.message_seconds(load.tokens)
        return float(seconds)

    def parts_seconds(self, attentions: int, mlps: int, load: PassLoad) -> Any:
        """One pass through so many attentions and MLPs; numbers or arrays, as `load` has them.

        Weights are read once for all rows and prompt pieces of the pass; keys and values of rows
        are read for each row.
        """
        layer, tokens = self._layout.layer, load.tokens
        attention, mlp = forward_operations(layer, tokens, 0)
        attention += score_operations(layer, load.keys * load.width + load.piece_pairs)
        cache = load.keys * kv_bytes_per_token(layer, self._itemsize)
        seconds = attentions * self._read_or_compute(layer.attention_parameters, attention, cache)
        seconds += mlps * self._read_or_compute(layer.mlp_parameters, mlp)
        # Half of a layer's overhead, and one of its two sums over shards, for each part.
        overhead = self._assumed.layer_overhead_us / 2 * 1e-6
        return seconds + (attentions + mlps) * (overhead + self._sum_seconds(tokens))

    def head_seconds(self, width: int = 1) -> float:
        """Logits of one slot group."""
        return float(self.rows_head_seconds(self._rows() * width))

    def rows_head_seconds(self, tokens: Any) -> Any:
        """Logits of so many tokens; numbers or arrays."""
        matrix = self._layout.vocab_matrix
        return self._read_or_compute(matrix, 2 * tokens * matrix)

    def message_seconds(self, tokens: Any) -> Any:
        """Hidden states of so many tokens to the next stage; numbers or arrays."""
        size = tokens * self._layout.layer.hidden * self._itemsize
        latency = self._assumed.message_latency_us * 1e-6
        return latency + size / pipeline_link(self._layout, self._hardware)

    def layer_seconds(self) -> float:
        """One layer for one slot group; `head_seconds` over it is what `nested.head_cost` wants."""
        full = LayerSkipPlan.full(self._layout.architecture.num_layers)
        first = self.stage_seconds(full, 0)
        if self._layout.is_last(0):
            first -= self.head_seconds()
        return first / len(self._layers[0])

    def _sum_seconds(self, tokens: Any) -> Any:
        """The sum over tensor-parallel shards after an attention or an MLP."""
        shards = self._layout.tensor
        if shards == 1:
            return 0.0
        size = tokens * self._layout.layer.hidden * self._itemsize * ring_share(shards)
        latency = self._assumed.all_reduce_latency_us * 1e-6
        return latency + size / tensor_link(self._layout, self._hardware)

    def _read_or_compute(self, parameters: int, operations: Any, cache: Any = 0.0) -> Any:
        moved = parameters * self._itemsize + cache
        return np.maximum(moved / self._bandwidth, operations / self._speed)

    def _num_rounds(self) -> float:
        """Until the longest completion of the last slots ends."""
        waves = max(1.0, self._workload.num_sequences / self._slots)
        return waves * self._response + (self._rollout.max_new_tokens - self._response)

    def _rows(self) -> float:
        """Mean sequences of a slot group."""
        total = self._workload.num_sequences * self._response
        return max(1.0, total / self._num_rounds() / self._layout.pipeline)

    def _prefill(self, plan: LayerSkipPlan) -> float:
        """All prompts once through the slowest stage; samples of a prompt share it."""
        tokens = self._workload.num_prompts * self._prompt
        attention, mlp = forward_operations(self._layout.layer, tokens, self._prompt / 2)
        times = []
        for layers in self._layers:
            attentions, mlps = parts_run(plan, layers)
            seconds = (attentions * attention + mlps * mlp) / self._speed
            times.append(seconds + (attentions + mlps) * self._sum_seconds(tokens))
        return max(times)
