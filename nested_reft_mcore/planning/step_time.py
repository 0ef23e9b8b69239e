"""How long a step takes, part by part, on a stated machine: a roofline, no simulation.

Big matrix products run at a stated share of the peak; decoding at a stated share of the memory
bandwidth, since it reads all active weights and all keys and values for every token; messages at
a stated share of the links'. `planning.hardware` names every share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.decode_time import DecodeModel
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layer_costs import FLOAT32, forward_operations, stream_bytes
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.links import data_link, pipeline_link, ring_share, tensor_link
from nested_reft_mcore.planning.memory import static_memory
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
    ) -> None:
        self._config = config
        self._layout = layout
        self._workload = workload
        self._hardware = hardware
        self._assumed = hardware.assumptions
        self.decode = DecodeModel(config, layout, workload, hardware, slots)
        self._prompt = self._assumed.prompt_fill * config.data.max_prompt_length
        self._response = self._assumed.response_fill * config.rollout.max_new_tokens
        peak = hardware.peak_tflops
        if ITEMSIZE[config.model.dtype] == FLOAT32:
            peak = hardware.peak_tflops_float32
        self._speed = peak * 1e12 * self._assumed.matmul_efficiency

    def step(self, plans: Sequence[LayerSkipPlan]) -> StepTime:
        """A step whose rollouts follow one plan or the other: the mean over `plans`."""
        tokens = self._workload.num_sequences * (self._prompt + self._response)
        bubble, update = self._update()
        return StepTime(
            generation=sum(self.decode.seconds(plan) for plan in plans) / len(plans),
            logprobs=self._num_logprob_passes() * self._passes(backward=False)[1],
            update=update,
            rest=self._rest(),
            bubble=bubble,
            tokens=tokens * self._layout.data,
            world_size=self._layout.world_size,
        )

    def _update(self) -> tuple[float, float]:
        """Share of the bubble, and seconds of all updates of a step."""
        updates = self._config.train.updates_per_step
        bubble, passes = self._passes(backward=True)
        each = self._reduction(passes) + self._optimizer()
        return bubble, passes + updates * each

    def _passes(self, *, backward: bool) -> tuple[float, float]:
        """Share of the bubble, and seconds of all micro-batches of a step through all stages."""
        count, tokens = self._micro_batches()
        times = [self._micro_batch(stage, tokens, backward) for stage in self._stages()]
        ramp = (self._layout.pipeline - 1) / (self._layout.num_chunks if backward else 1)
        updates = self._config.train.updates_per_step if backward else 1
        per_update = count / updates
        return ramp / (per_update + ramp), updates * (per_update + ramp) * max(times)

    def _micro_batches(self) -> tuple[float, float]:
        """Number in a step, and tokens of each, padding included."""
        train, sequences = self._config.train, self._workload.num_sequences
        if train.max_tokens_per_micro_batch is None:
            # All are padded to the longest row of the batch.
            rows = self._workload.shape.tokens // self._workload.longest
            return sequences / rows, self._workload.shape.tokens
        used = train.max_tokens_per_micro_batch * self._assumed.packing_fill
        tokens = sequences * (self._prompt + self._response)
        return max(1.0, tokens / used), min(tokens, train.max_tokens_per_micro_batch)

    def _micro_batch(self, stage: int, tokens: float, backward: bool) -> float:
        """Seconds of one micro-batch on a stage."""
        layer, layers = self._layout.layer, len(self._layout.layers_of(stage))
        # A causal token looks at half of its sequence on average.
        per_layer = sum(forward_operations(layer, tokens, self._workload.longest / 2))
        is_recomputed = self._config.model.recompute_granularity == "full"
        passes = (4 if is_recomputed else 3) if backward else 1
        operations = passes * layers * per_layer
        if self._layout.is_last(stage):
            # The backward pass makes the logits again.
            operations += (4 if backward else 1) * 2 * tokens * self._layout.vocab_matrix
        shares = tokens / self._workload.shape.tokens
        stream = stream_bytes(layer, self._workload.shape) * shares
        full = stream * self._workload.shape.sequence_shards
        # Two all-reduces a layer and direction, or as many gathers and scatters.
        sums = 2 * passes if not backward else 2 * (passes - 1)
        wire = sums * layers * full * ring_share(self._layout.tensor)
        seconds = operations / self._speed + wire / tensor_link(self._layout, self._hardware)
        if self._layout.pipeline > 1:
            sent = stream * (2 if backward else 1) * self._layout.num_chunks
            seconds += sent / pipeline_link(self._layout, self._hardware)
        return seconds

    def _reduction(self, passes: float) -> float:
        """Sum of the gradients over replicas, as far as nothing hides it."""
        layout, optimizer = self._layout, self._config.optimizer
        count = max(layout.parameters(stage) for stage in self._stages())
        moved = FLOAT32 * count * ring_share(layout.data)
        if optimizer.use_distributed_optimizer:
            weight = ITEMSIZE[self._config.model.dtype]
            moved = (FLOAT32 + weight) * count * ring_share(layout.data) / 2
        seconds = moved / data_link(layout, self._hardware)
        if optimizer.overlap_grad_reduce:
            # It runs while the last micro-batch goes backward.
            per_micro_batch = passes / max(1.0, self._micro_batches()[0])
            seconds = max(0.0, seconds - per_micro_batch / 2)
        return seconds

    def _optimizer(self) -> float:
        """Reading gradients and state, writing state and weights."""
        slowest = 0
        for stage in self._stages():
            static = static_memory(self._config, self._layout, stage)
            slowest = max(slowest, static.gradients + 2 * static.optimizer + static.weights)
        bandwidth = self._hardware.memory_gb_per_s * 1e9 * self._assumed.decode_efficiency
        return slowest / bandwidth

    def _rest(self) -> float:
        config, link = self._config, self._hardware.host_link_gb_per_s * 1e9
        seconds = self._workload.num_sequences * self._assumed.reward_seconds
        seconds /= config.reward.num_workers
        static = [static_memory(config, self._layout, stage) for stage in self._stages()]
        if self._has_reference:
            # In and out, both ways.
            seconds += 4 * max(s.weights for s in static) / link
        if config.checkpoint.interval:
            copied = max(s.weights + s.optimizer for s in static)
            seconds += copied / link / config.checkpoint.interval
        return seconds

    def _num_logprob_passes(self) -> int:
        algorithm = self._config.algorithm
        needs_old = algorithm.objective != "reinforce" and not algorithm.bypass_mode
        return (needs_old or algorithm.kl_reward_coef > 0) + self._has_reference

    @property
    def _has_reference(self) -> bool:
        algorithm = self._config.algorithm
        return algorithm.kl_loss_coef > 0 or algorithm.kl_reward_coef > 0

    def _stages(self) -> range:
        return range(self._layout.pipeline)
