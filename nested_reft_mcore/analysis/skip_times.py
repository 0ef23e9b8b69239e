"""How long a decode pass takes under a plan, from the measured times of parts."""

from __future__ import annotations

from dataclasses import dataclass

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, Part
from nested_reft_mcore.algorithm.skip_schedule import head_on_last_stage
from nested_reft_mcore.config.probe_record import DecodeTimes


@dataclass(frozen=True)
class SkipTimes:
    """Seconds of parts, and which stage they are on; the slowest stage sets the pace."""

    part_seconds: dict[Part, float]
    stage_of_layer: tuple[int, ...]
    stage_extra: tuple[float, ...]
    """What each stage spends besides its layers."""

    @classmethod
    def of(cls, times: DecodeTimes, stage_of_layer: tuple[int, ...]) -> SkipTimes:
        """From a probe's times; the head is on the last stage."""
        num_stages = max(stage_of_layer) + 1
        seconds: dict[Part, float] = {
            "layer": times.layer,
            "attention": times.attention,
            "mlp": times.mlp,
        }
        return cls(seconds, stage_of_layer, head_on_last_stage(times.head, num_stages))

    @property
    def layer(self) -> float:
        """Seconds of a whole layer."""
        return self.part_seconds["layer"]

    @property
    def stage_extra_in_layers(self) -> tuple[float, ...]:
        """`stage_extra` in units of a layer."""
        return tuple(extra / self.layer for extra in self.stage_extra)

    def speedup(self, plan: LayerSkipPlan) -> float:
        """Time of the slowest full stage over that of the slowest stage under the plan."""
        full = [
            self.stage_of_layer.count(stage) * self.layer + extra
            for stage, extra in enumerate(self.stage_extra)
        ]
        left = list(full)
        for layer, part in sorted(plan.skipped):
            left[self.stage_of_layer[layer]] -= self.part_seconds[part]
        return max(full) / max(*left, 1e-12)

    def even_speedup(self, part: Part, num_skipped: int) -> float:
        """The same for k parts that are spread over stages as the stages' times are."""
        full = len(self.stage_of_layer) * self.layer + sum(self.stage_extra)
        return full / max(full - num_skipped * self.part_seconds[part], 1e-12)
