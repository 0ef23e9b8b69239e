"""How long a step's generation takes under a skip plan.

With several pipeline stages as many slot groups are under way, and the fullest stage sets the pace:
a token for every slot takes as many of its passes as there are stages.
"""

from __future__ import annotations

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layer_costs import (
    FLOAT32,
    forward_operations,
    kv_bytes_per_token,
    parts_run,
)
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.workload import ITEMSIZE, Workload


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
        self._workload = workload
        self._assumed = assumed
        self._itemsize = ITEMSIZE[config.model.dtype]
        is_wide = self._itemsize == FLOAT32
        peak = hardware.peak_tflops_float32 if is_wide else hardware.peak_tflops
        self._speed = peak * 1e12 * assumed.matmul_efficiency
        self._bandwidth = hardware.memory_gb_per_s * 1e9 * assumed.decode_efficiency
        self._prompt = assumed.prompt_fill * config.data.max_prompt_length
        self._response = assumed.response_fill * config.rollout.max_new_tokens
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
        """One pass of one slot group through one stage."""
        layer, (attentions, mlps) = self._layout.layer, parts_run(plan, self._layers[stage])
        rows = self._rows()
        seconds = attentions * self._attention_seconds(rows, width)
        seconds += mlps * self._read_or_compute(
            layer.mlp_parameters, forward_operations(layer, rows * width, 0)[1]
        )
        # Half of a layer's overhead, and one of its two sums over shards, for each part.
        latency = self._assumed.layer_overhead_us / 2
        latency += self._assumed.all_reduce_latency_us if self._layout.tensor > 1 else 0.0
        seconds += (attentions + mlps) * latency * 1e-6
        if self._layout.is_last(stage):
            seconds += self.head_seconds(width)
        if self._layout.pipeline > 1:
            seconds += self._assumed.message_latency_us * 1e-6
        return seconds

    def head_seconds(self, width: int = 1) -> float:
        """Logits of one slot group."""
        matrix = self._layout.vocab_matrix
        return self._read_or_compute(matrix, 2 * self._rows() * width * matrix)

    def layer_seconds(self) -> float:
        """One layer for one slot group; `head_seconds` over it is what `nested.head_cost` wants."""
        full = LayerSkipPlan.full(self._layout.architecture.num_layers)
        first = self.stage_seconds(full, 0)
        if self._layout.is_last(0):
            first -= self.head_seconds()
        return first / len(self._layers[0])

    def _attention_seconds(self, rows: float, width: int) -> float:
        context = self._prompt + self._response / 2
        layer = self._layout.layer
        operations = forward_operations(layer, rows * width, context)[0]
        cache = rows * context * kv_bytes_per_token(layer, self._itemsize)
        return self._read_or_compute(layer.attention_parameters, operations, cache)

    def _read_or_compute(self, parameters: int, operations: float, cache: float = 0.0) -> float:
        moved = parameters * self._itemsize + cache
        return max(moved / self._bandwidth, operations / self._speed)

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
            times.append((attentions * attention + mlps * mlp) / self._speed)
        return max(times)
