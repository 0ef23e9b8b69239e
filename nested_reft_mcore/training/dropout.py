"""Layer dropout: which random layers a batch of the warm-up, or an update, leaves out.

Pure functions of the seed and of what is counted, the same on every process and in every layout.
"""

from __future__ import annotations

from collections.abc import Collection

from nested_reft_mcore.algorithm.counter_random import Stream, integer_below
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, draw_plan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.mcore.model import Policy


def warm_up_dropout(config: Config, policy: Policy, step: int) -> LayerSkipPlan:
    """Of a batch of `sft`: from `sft.min_skipped` to `sft.max_skipped` layers."""
    sft = config.sft
    return _draw(
        policy, range(sft.min_skipped, sft.max_skipped + 1), sft.border_layers, (config.seed, step)
    )


def update_dropout(config: Config, policy: Policy, step: int, number: int) -> LayerSkipPlan:
    """Of a step's update `number`: none to `train.max_dropped_layers`, as `nested` allows."""
    nested, updates = config.nested, config.train.updates_per_step
    return _draw(
        policy,
        range(config.train.max_dropped_layers + 1),
        nested.border_layers,
        (config.seed, step * updates + number),
        nested.protected_layers,
    )


def _draw(
    policy: Policy,
    sizes: range,
    border_layers: int,
    key: tuple[int, int],
    protected_layers: Collection[int] = (),
) -> LayerSkipPlan:
    num_skipped = sizes[integer_below(len(sizes), Stream.LAYER_DROPOUT, *key)]
    return draw_plan(
        "uniform",
        policy.architecture.num_layers,
        num_skipped,
        border_layers,
        policy.stage_of_layer,
        (Stream.LAYER_DROPOUT, *key, 1),
        protected_layers=protected_layers,
    )
