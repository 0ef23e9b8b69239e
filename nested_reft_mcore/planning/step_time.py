"""How long a step takes, part by part, on a stated machine: a roofline, no simulation.

Big matrix products run at a stated share of the peak; decoding at a stated share of the memory
bandwidth, since it reads all active weights and all keys and values for every token; messages at
a stated share of the links'. `planning.hardware` names every share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.decode_time import DecodeModel
from nested_reft_mcore.planning.expected_step import ExpectedStep, expected_step
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layer_costs import FLOAT32, forward_operations, saved_bytes
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.links import data_link, pipeline_link, ring_share, tensor_link
from nested_reft_mcore.planning.memory import static_memory
from nested_reft_mcore.planning.product_rate import peak_operations
from nested_reft_mcore.planning.workload import ITEMSIZE, Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    generation: float
    logprobs: float
    """Passes without a gradient: old and reference log-probs."""
    update: float
    """Forward and backward passes, reduction of gradients, optimizer."""
    rest: float
    """Rewards, exchanging the reference, snapshots for checkpoints."""
    bubble: float
    """Share of an update's passes in which a stage waits for others."""
    tokens: float
    """Prompt and response tokens of the step, of all replicas."""
    world_size: int

    @property
    def total(self) -> float:
        """All parts one after the other."""
        return self.generation + self.logprobs + self.update + self.rest

    @property
    def tokens_per_second(self) -> float:
        """`perf/throughput`: prompt and response tokens a second on each rank."""
        return self.tokens / self.total / self.world_size


class StepModel:
    """Times of one configuration on one layout; `step(plans)` under some skip plans."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        workload: Workload,
        hardware: HardwareProfile,
        slots: int,
        expected: ExpectedStep | None = None,
    ) -> None:
        """`expected`: the lengths of a replica's step, where they are known."""
        hardware = hardware.crowded(min(layout.world_size, layout.gpus_per_node))
        self._config = config
        self._layout = layout
        self._workload = workload
        self._hardware = hardware
        self._assumed = hardware.assumptions
        if expected is None:
            expected = expected_step(config, layout, workload, self._assumed, slots)
        self._expected = expected
        self.decode = DecodeModel(config, layout, workload, hardware, slots, expected)
        peak = peak_operations(hardware, ITEMSIZE[config.model.dtype])
        self._speed = peak * self._assumed.matmul_efficiency
        self._bandwidth = hardware.memory_gb_per_s * 1e9

    def step(self, plans: Sequence[LayerSkipPlan]) -> StepTime:
        """A step whose rollouts follow one plan or the other: the mean over `plans`."""
        return self.step_with(sum(self.decode.seconds(plan) for plan in plans) / len(plans))

    def step_with(self, generation: float) -> StepTime:
        """A step whose generation takes so many seconds."""
        bubble, update = self._update()
        return StepTime(
            generation=generation,
            logprobs=self.num_logprob_passes * self._passes(backward=False)[1],
            update=update,
            rest=self._rest(),
            bubble=bubble,
            tokens=self._expected.num_tokens * self._layout.data,
            world_size=self._layout.world_size,
        )

    def _update(self) -> tuple[float, float]:
        """Share of the bubble, and seconds of all updates of a step."""
        updates = self._config.train.updates_per_step
        bubble, passes = self._passes(backward=True)
        per_micro_batch = passes / max(1.0, self._micro_batches()[0])
        slowest = max(self.reduction_seconds(stage, per_micro_batch) for stage in self._stages())
        each = slowest + max(self.optimizer_seconds(stage) for stage in self._stages())
        return bubble, passes + updates * each

    def _passes(self, *, backward: bool) -> tuple[float, float]:
        """Share of the bubble, and seconds of all micro-batches of a step through all stages.

        The first micro-batch takes every stage's time, each other one the slowest stage's. The
        bubble's share is that of stages that take equally long.
        """
        count, tokens = self._micro_batches()
        times = [self._micro_batch(stage, tokens, backward) for stage in self._stages()]
        if self._layout.pipeline > 1:
            latency = self._assumed.message_latency_us * 1e-6
            times = [seconds + (2 if backward else 1) * latency for seconds in times]
        chunks = self._layout.num_chunks if backward else 1
        ramp = (self._layout.pipeline - 1) / chunks
        updates = self._config.train.updates_per_step if backward else 1
        per_update, slowest = count / updates, max(times)
        seconds = per_update * slowest + (sum(times) - slowest) / chunks
        return ramp / (per_update + ramp), updates * seconds

    def _micro_batches(self) -> tuple[float, float]:
        """Number in a step, and tokens of each, padding included."""
        train, sequences = self._config.train, self._workload.num_sequences
        if train.max_tokens_per_micro_batch is None:
            # All are padded to the longest row of the batch.
            rows = self._workload.shape.tokens // self._workload.longest
            return sequences / rows, rows * self._longest()
        used = train.max_tokens_per_micro_batch * self._assumed.packing_fill
        tokens = sum(self._expected.sequences)
        return max(1.0, tokens / used), min(tokens, train.max_tokens_per_micro_batch)

    def _longest(self) -> int:
        """Tokens of the longest row, as sequence parallelism rounds them."""
        multiple = self._workload.shape.sequence_shards
        return -(-max(self._expected.sequences) // multiple) * multiple

    def _micro_batch(self, stage: int, tokens: float, backward: bool) -> float:
        """Seconds of one micro-batch on a stage."""
        # A causal token looks at half of its sequence on average.
        context, chunks = self._longest() / 2, self._layout.num_chunks
        layers = len(self._layout.layers_of(stage)) // chunks
        seconds = 0.0
        for is_backward in (False, True) if backward else (False,):
            for chunk in range(chunks):
                has_head = self._layout.is_last(stage) and chunk == chunks - 1
                seconds += self.pass_seconds(
                    tokens, context, layers, has_head=has_head, backward=is_backward
                )
        return seconds

    def pass_seconds(
        self, tokens: Any, context: Any, num_layers: int, *, has_head: bool, backward: bool
    ) -> Any:
        """One pass of a micro-batch, in one direction, through some layers of one rank.

        Args:
            tokens: Of the micro-batch, padding included; a number or an array.
            context: Places that a token looks at, on average; of the same shape.
            num_layers: Of the stage, or of one of its virtual chunks.
            has_head: Whether log-probs are made at the end.
            backward: Its backward pass, which makes logits again, and under full recomputation
                the layers too.
        """
        layer, shards = self._layout.layer, self._workload.shape.sequence_shards
        per_layer = sum(forward_operations(layer, tokens, context))
        is_recomputed = self._config.model.recompute_granularity == "full"
        passes = (3 if is_recomputed else 2) if backward else 1
        operations = passes * num_layers * per_layer
        if has_head:
            operations += (3 if backward else 1) * 2 * tokens * self._layout.vocab_matrix
        full = tokens * layer.hidden * ITEMSIZE[self._config.model.dtype]
        # Two all-reduces a layer and direction, or as many gathers and scatters.
        sums = 4 if backward and is_recomputed else 2
        wire = sums * num_layers * full * ring_share(self._layout.tensor)
        seconds = operations / self._speed + wire / tensor_link(self._layout, self._hardware)
        seconds += self._traffic_seconds(tokens, 2 * context, num_layers, has_head)
        fixed = num_layers * self._assumed.update_layer_overhead_us
        # No micro-batch, no time: the simulation has places for some that do not come.
        seconds += (fixed + self._assumed.micro_batch_overhead_us) * 1e-6 * (tokens > 0)
        if self._layout.pipeline > 1:
            seconds += full / shards / pipeline_link(self._layout, self._hardware)
        return seconds

    def _traffic_seconds(self, tokens: Any, length: Any, num_layers: int, has_head: bool) -> Any:
        """Reading and writing what is kept for the backward pass, apart from matrix products."""
        times = self._assumed.activation_traffic
        if times == 0.0:
            return 0.0
        shape = replace(self._workload.shape, tokens=tokens, length=length)
        moved = num_layers * saved_bytes(self._layout.layer, shape)
        if has_head:
            moved = moved + tokens * self._layout.vocab_rows * FLOAT32
        return times * moved / self._bandwidth

    def reduction_seconds(self, stage: int, per_micro_batch: float) -> float:
        """Sum of a stage's gradients over replicas, as far as nothing hides it.

        `per_micro_batch` are the seconds of a forward and backward pass on that stage.
        """
        layout, optimizer = self._layout, self._config.optimizer
        count = layout.parameters(stage)
        moved = FLOAT32 * count * ring_share(layout.data)
        if optimizer.use_distributed_optimizer:
            weight = ITEMSIZE[self._config.model.dtype]
            moved = (FLOAT32 + weight) * count * ring_share(layout.data) / 2
        seconds = moved / data_link(layout, self._hardware)
        if optimizer.overlap_grad_reduce:
            # It runs while the last micro-batch goes backward.
            seconds = max(0.0, seconds - per_micro_batch / 2)
        return seconds

    def optimizer_seconds(self, stage: int) -> float:
        """Reading a stage's gradients and state, writing state and weights."""
        static = static_memory(self._config, self._layout, stage)
        moved = static.gradients + 2 * static.optimizer + static.weights
        moving = moved / (self._bandwidth * self._assumed.optimizer_efficiency)
        return moving + self._assumed.update_overhead_ms * 1e-3

    def _rest(self) -> float:
        return self.judging_seconds() + self.between_seconds()

    def between_seconds(self) -> float:
        """What is neither generation, log-probs, update nor judging, for everybody."""
        fixed = self._assumed.step_overhead_ms * 1e-3
        return self.exchange_seconds() + self.snapshot_seconds() + fixed

    def judging_seconds(self) -> float:
        """Rewards of a replica's completions, on its reward workers."""
        seconds = self._workload.num_sequences * self._assumed.reward_seconds
        return seconds / self._config.reward.num_workers

    def exchange_seconds(self) -> float:
        """The reference policy in place of the trained one and back, where there is one."""
        if not self._has_reference:
            return 0.0
        static = [static_memory(self._config, self._layout, stage) for stage in self._stages()]
        # In and out, both ways.
        return 4 * max(s.weights for s in static) / (self._hardware.host_link_gb_per_s * 1e9)

    def snapshot_seconds(self) -> float:
        """Copies to the host for checkpoints, spread over the steps between two."""
        interval = self._config.checkpoint.interval
        if not interval:
            return 0.0
        static = [static_memory(self._config, self._layout, stage) for stage in self._stages()]
        copied = max(s.weights + s.optimizer for s in static)
        return copied / (self._hardware.host_link_gb_per_s * 1e9) / interval

    @property
    def num_logprob_passes(self) -> int:
        """Passes without a gradient that each sequence takes: old and reference log-probs."""
        algorithm = self._config.algorithm
        needs_old = algorithm.objective != "reinforce" and not algorithm.bypass_mode
        return (needs_old or algorithm.kl_reward_coef > 0) + self._has_reference

    @property
    def _has_reference(self) -> bool:
        algorithm = self._config.algorithm
        return algorithm.kl_loss_coef > 0 or algorithm.kl_reward_coef > 0

    def _stages(self) -> range:
        return range(self._layout.pipeline)
