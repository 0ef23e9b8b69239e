"""The plans that are compared: full depth, some layers or parts skipped, all of them skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nested_reft_mcore.algorithm.counter_random import Stream
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, Part, draw_plan
from nested_reft_mcore.config.bench import BenchRolloutOptions, PartName, layers_of_percentage

FULL = "full depth"
"""Key of the case that skips nothing."""


@dataclass(frozen=True)
class Case:
    """One plan with its name."""

    key: str
    part: PartName | None
    """What it skips; None at full depth."""
    num_skipped: int
    percentages: tuple[float, ...]
    """The asked shares that come to this number of layers; empty where all are skipped."""
    plan: LayerSkipPlan


def make_cases(
    options: BenchRolloutOptions, num_layers: int, stage_of_layer: Sequence[int]
) -> list[Case]:
    """Full depth, then for every part each number of layers, then all (for the ceiling).

    The plans are drawn by the law of the house, from the seed; percentages that come to the same
    number of layers are one case.
    """
    cases = [Case(FULL, None, 0, (0.0,), LayerSkipPlan.full(num_layers))]
    for part in options.part_names:
        asked: dict[int, list[float]] = {}
        for percentage in options.percentages:
            asked.setdefault(layers_of_percentage(percentage, num_layers), []).append(percentage)
        asked.pop(0, None)
        for count, percentages in asked.items():
            plan = draw_plan(
                options.law,
                num_layers,
                count,
                options.border_layers,
                stage_of_layer,
                (Stream.PLAN, options.seed, 0),
                part,
            )
            cases.append(Case(f"{count} {part}", part, count, tuple(percentages), plan))
        if not asked:
            continue
        everything: frozenset[tuple[int, Part]] = frozenset(
            (layer, part) for layer in range(num_layers)
        )
        plan = LayerSkipPlan(num_layers, everything)
        cases.append(Case(all_key(part), part, num_layers, (), plan))
    return cases


def all_key(part: PartName) -> str:
    """Key of the case that skips this part everywhere."""
    return f"every {part}"
