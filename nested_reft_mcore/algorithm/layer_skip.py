"""Which layers, or parts of layers, the nested behavior policy leaves out (arXiv 2508.10123).

A plan is a set of (layer, part). Two laws here draw plans: `uniform` takes k layers without
replacement from the valid ones, and `stage_balanced` takes, uniformly at random, one of the plans
whose slowest pipeline stage is fastest; `sensitivity` has a file of its own. All are a function of
their key alone, so every rank draws the same plan without a word, and a resumed run draws the plan
that the lost run would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

from nested_reft_mcore.algorithm.counter_random import bits, integer_below, shuffled

Part = Literal["layer", "attention", "mlp"]
SkipLaw = Literal["uniform", "stage_balanced"]

PART_COST: dict[Part, float] = {"layer": 1.0, "attention": 0.5, "mlp": 0.5}
"""Time of a part in units of a layer; nominal: the true split hangs on context length."""

_PART_CODE: dict[Part, int] = {"layer": 0, "attention": 1, "mlp": 2}
_EXAMPLE = "3,5.attention,7.mlp"
_COST_TOLERANCE = 1e-9


@dataclass(frozen=True)
class LayerSkipPlan:
    """The parts of global, 0-based layers that do not run.

    Attention and mlp of the same layer together become the whole layer, so equal plans compare
    equal. Raises ValueError for a layer that does not exist or an unknown part.
    """

    num_layers: int
    """Layers of the full model."""
    skipped: frozenset[tuple[int, Part]] = frozenset()
    """What is left out."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"a plan needs at least one layer, got num_layers={self.num_layers}")
        for layer, part in self.skipped:
            if part not in get_args(Part):
                raise ValueError(f"unknown part {part!r} of layer {layer}: {_parts_hint()}")
            _check_layer(layer, self.num_layers)
        object.__setattr__(self, "skipped", _normalised(self.skipped))

    @classmethod
    def full(cls, num_layers: int) -> LayerSkipPlan:
        """The plan that skips nothing: the target policy."""
        return cls(num_layers)

    @classmethod
    def parse(cls, text: str, num_layers: int) -> LayerSkipPlan:
        """Read what `describe` writes, such as `3,5.attention,7.mlp`; `none` skips nothing.

        Raises ValueError naming the entry that cannot be read and what would be.
        """
        if text.strip() in ("", "none"):
            return cls.full(num_layers)
        return cls(num_layers, frozenset(_parse_entry(e, text) for e in text.split(",")))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerSkipPlan:
        """Inverse of `to_dict`; raises ValueError where a key is missing or cannot be read."""
        num_layers, skipped = record.get("num_layers"), record.get("skipped")
        if not isinstance(num_layers, int) or not isinstance(skipped, str):
            raise ValueError(
                f"a plan record has an integer `num_layers` and a string `skipped` such as "
                f"{_EXAMPLE!r}, got {dict(record)!r}"
            )
        return cls.parse(skipped, num_layers)

    def to_dict(self) -> dict[str, int | str]:
        """A JSON-ready record: `num_layers` and the text of `describe`."""
        return {"num_layers": self.num_layers, "skipped": self.describe()}

    def describe(self) -> str:
        """The skipped parts in layer order, such as `3,5.attention`; `none` where all run."""
        entries = [
            str(layer) if part == "layer" else f"{layer}.{part}" for layer, part in self._ordered
        ]
        return ",".join(entries) or "none"

    def skips_attention(self, layer: int) -> bool:
        """Whether the attention of this global layer is left out (and needs no KV cache)."""
        return (layer, "attention") in self.skipped or (layer, "layer") in self.skipped

    def skips_mlp(self, layer: int) -> bool:
        """Whether the mlp of this global layer is left out."""
        return (layer, "mlp") in self.skipped or (layer, "layer") in self.skipped

    def skips_layer(self, layer: int) -> bool:
        """Whether nothing of this global layer runs."""
        return (layer, "layer") in self.skipped

    @cached_property
    def active(self) -> tuple[int, ...]:
        """Layers of which at least one part runs, ascending."""
        return tuple(layer for layer in range(self.num_layers) if not self.skips_layer(layer))

    @property
    def num_skipped(self) -> int:
        """Entries of `skipped`: a whole layer counts once, and so does a lone part."""
        return len(self.skipped)

    @property
    def skip_ratio(self) -> float:
        """Share of the model's 2 * num_layers parts that is left out.

        A whole layer is two parts, so for whole layers this is the share of layers.
        """
        num_parts = sum(2 if part == "layer" else 1 for _, part in self.skipped)
        return num_parts / (2 * self.num_layers)

    def digest(self) -> str:
        """16 hexadecimal digits that are the same in every process and for every Python."""
        key = [x for layer, part in self._ordered for x in (layer, _PART_CODE[part])]
        return f"{bits(self.num_layers, *key):016x}"

    @cached_property
    def _ordered(self) -> tuple[tuple[int, Part], ...]:
        return tuple(sorted(self.skipped))


def num_skipped_layers(skip_ratio: float, num_layers: int) -> int:
    """k = skip_ratio * num_layers rounded to the nearest integer, halves up.

    The product is taken as a decimal would be: 0.29 of 50 layers is 14.5, hence 15, although the
    float product falls just below.
    """
    if not 0.0 <= skip_ratio <= 1.0:
        raise ValueError(f"skip_ratio is a share between 0 and 1, got {skip_ratio}")
    return math.floor(skip_ratio * num_layers + 0.5 + 1e-9)


def draw_plan(
    law: SkipLaw,
    num_layers: int,
    num_skipped: int,
    border_layers: int,
    stage_of_layer: Sequence[int],
    key: tuple[int, ...],
    part: Part = "layer",
    stage_extra_cost: Sequence[float] | None = None,
    protected_layers: Collection[int] = (),
) -> LayerSkipPlan:
    """Draw the plan that belongs to `key`, with `num_skipped` entries of kind `part`.

    Layers closer than `border_layers` to either end and `protected_layers` are never taken.
    `stage_of_layer[i]` is the physical pipeline rank of global layer i (all virtual chunks of a
    rank are one stage), and `stage_extra_cost[s]` what stage s spends besides its layers
    (embedding, head), in units of a layer. Both laws are uniform over a set of plans, the largest
    entropy there is: `uniform` over all plans of that size, `stage_balanced` over those that
    minimise the cost of the slowest stage. Raises ValueError where more entries are asked for than
    valid layers exist.
    """
    valid = _valid_layers(num_layers, num_skipped, border_layers, protected_layers)
    pools = _stage_pools(valid, num_layers, stage_of_layer, stage_extra_cost)
    if law == "uniform":
        # Stages mean nothing to it: the same plan for every parallel layout.
        pools = [_StagePool(sum(pool.cost for pool in pools), valid)]
    floors = _stage_floors(law, pools, num_skipped, PART_COST[part])
    ways = _ways_to_finish(pools, floors, num_skipped)
    skipped: list[int] = []
    for stage, pool in enumerate(pools):
        remaining = num_skipped - len(skipped)
        ticket = integer_below(ways[stage][remaining], *key, 0, stage)
        count = floors[stage]
        while True:
            share = math.comb(len(pool.valid), count) * ways[stage + 1][remaining - count]
            if ticket < share:
                break
            ticket -= share
            count += 1
        skipped += shuffled(pool.valid, *key, 1, stage)[:count]
    return LayerSkipPlan(num_layers, frozenset((layer, part) for layer in skipped))


def inclusion_probabilities(
    law: SkipLaw,
    num_layers: int,
    num_skipped: int,
    border_layers: int,
    stage_of_layer: Sequence[int],
    part: Part = "layer",
    stage_extra_cost: Sequence[float] | None = None,
    protected_layers: Collection[int] = (),
) -> list[float]:
    """Probability that `draw_plan` skips each layer; they add up to `num_skipped`.

    Exact: the law is uniform over its plans, so it is the share of plans that hold the layer,
    counted in integers.
    """
    valid = _valid_layers(num_layers, num_skipped, border_layers, protected_layers)
    pools = _stage_pools(valid, num_layers, stage_of_layer, stage_extra_cost)
    floors = _stage_floors(law, pools, num_skipped, PART_COST[part])
    probabilities = [0.0] * num_layers
    for stage, pool in enumerate(pools):
        others = [p for s, p in enumerate(pools) if s != stage]
        other_floors = [f for s, f in enumerate(floors) if s != stage]
        other_ways = _ways_to_finish(others, other_floors, num_skipped)[0]
        size = len(pool.valid)
        plans = [
            math.comb(size, m) * other_ways[num_skipped - m] if m >= floors[stage] else 0
            for m in range(min(size, num_skipped) + 1)
        ]
        for layer in pool.valid:
            probabilities[layer] = sum(m * n for m, n in enumerate(plans)) / (sum(plans) * size)
    return probabilities


def fewest_skipped_per_stage(
    law: SkipLaw,
    num_layers: int,
    num_skipped: int,
    border_layers: int,
    stage_of_layer: Sequence[int],
    part: Part = "layer",
    stage_extra_cost: Sequence[float] | None = None,
    protected_layers: Collection[int] = (),
) -> list[int]:
    """Entries that every plan of the law takes from each stage, at least; as for `draw_plan`.

    What a stage keeps at most decides about its memory.
    """
    valid = _valid_layers(num_layers, num_skipped, border_layers, protected_layers)
    pools = _stage_pools(valid, num_layers, stage_of_layer, stage_extra_cost)
    floors = _stage_floors(law, pools, num_skipped, PART_COST[part])
    # What the other stages cannot give up either.
    return [
        max(floor, num_skipped - (len(valid) - len(pool.valid)))
        for floor, pool in zip(floors, pools, strict=True)
    ]


def predicted_speedup(
    plan: LayerSkipPlan,
    stage_of_layer: Sequence[int],
    stage_extra_cost: Sequence[float] | None = None,
) -> float:
    """Cost of the slowest stage of the full model over that of the slowest stage under the plan.

    That is the gain of pipelined decoding with all stages busy; infinite where nothing is left.
    """
    full = _stage_costs(LayerSkipPlan.full(plan.num_layers), stage_of_layer, stage_extra_cost)
    remaining = max(_stage_costs(plan, stage_of_layer, stage_extra_cost))
    return max(full) / remaining if remaining > 0 else math.inf


@dataclass(frozen=True)
class _StagePool:
    """What a stage costs in full, in units of a layer, and which of its layers may be skipped."""

    cost: float
    valid: tuple[int, ...]


def _valid_layers(
    num_layers: int, num_skipped: int, border_layers: int, protected_layers: Collection[int]
) -> tuple[int, ...]:
    """The layers that may be skipped; ValueError where they are too few."""
    if border_layers < 0:
        raise ValueError(f"border_layers cannot be negative, got {border_layers}")
    for layer in protected_layers:
        _check_layer(layer, num_layers)
    inner = range(border_layers, num_layers - border_layers)
    valid = tuple(layer for layer in inner if layer not in protected_layers)
    if not 0 <= num_skipped <= len(valid):
        protecting = f" and {sorted(protected_layers)} protected" if protected_layers else ""
        raise ValueError(
            f"cannot skip {num_skipped} of {num_layers} layers: with border_layers={border_layers}"
            f"{protecting} {len(valid)} are valid, so ask for 0 to {len(valid)}"
        )
    return valid


def _stage_pools(
    valid: Sequence[int],
    num_layers: int,
    stage_of_layer: Sequence[int],
    stage_extra_cost: Sequence[float] | None,
) -> list[_StagePool]:
    costs = _stage_costs(LayerSkipPlan.full(num_layers), stage_of_layer, stage_extra_cost)
    return [
        _StagePool(cost, tuple(layer for layer in valid if stage_of_layer[layer] == stage))
        for stage, cost in enumerate(costs)
    ]


def _stage_costs(
    plan: LayerSkipPlan,
    stage_of_layer: Sequence[int],
    stage_extra_cost: Sequence[float] | None,
) -> list[float]:
    """What each stage costs under the plan, in units of a layer."""
    if len(stage_of_layer) != plan.num_layers or min(stage_of_layer) < 0:
        raise ValueError(
            f"stage_of_layer needs a stage from 0 up for each of {plan.num_layers} layers, "
            f"got {list(stage_of_layer)}"
        )
    num_stages = max(stage_of_layer) + 1
    extra = list(stage_extra_cost) if stage_extra_cost is not None else [0.0] * num_stages
    if len(extra) < num_stages or any(not (0 <= cost < math.inf) for cost in extra):
        raise ValueError(
            f"stage_extra_cost needs a finite cost from 0 up for each of {num_stages} stages, "
            f"got {extra}"
        )
    halves = [0] * len(extra)
    for layer, stage in enumerate(stage_of_layer):
        halves[stage] += (not plan.skips_attention(layer)) + (not plan.skips_mlp(layer))
    return [cost + num * 0.5 for cost, num in zip(extra, halves, strict=True)]


def _stage_floors(
    law: SkipLaw, pools: Sequence[_StagePool], num_skipped: int, part_cost: float
) -> list[int]:
    """Fewest entries that each stage has to give up under the law.

    `stage_balanced`: taking each skip from the slowest stage, until that one has none left, ends
    at the least possible maximum; a plan reaches it if and only if every stage gets below it.
    """
    floors = [0] * len(pools)
    if law == "uniform":
        return floors
    if law != "stage_balanced":
        raise ValueError(f"unknown law {law!r}: choose one of {', '.join(get_args(SkipLaw))}")
    counts = [0] * len(pools)
    for _ in range(num_skipped):
        costs = [p.cost - part_cost * n for p, n in zip(pools, counts, strict=True)]
        slowest = costs.index(max(costs))
        if counts[slowest] == len(pools[slowest].valid):
            break
        counts[slowest] += 1
    least = max(p.cost - part_cost * n for p, n in zip(pools, counts, strict=True))
    for stage, pool in enumerate(pools):
        while pool.cost - part_cost * floors[stage] > least + _COST_TOLERANCE:
            floors[stage] += 1
    return floors


def _ways_to_finish(
    pools: Sequence[_StagePool], floors: Sequence[int], num_skipped: int
) -> list[list[int]]:
    """`ways[s][r]`: number of ways to take r layers from stages s and later, floors respected."""
    ways = [[1] + [0] * num_skipped]
    for pool, floor in zip(reversed(pools), reversed(floors), strict=True):
        later = ways[0]
        row = [
            sum(math.comb(len(pool.valid), m) * later[r - m] for m in range(floor, r + 1))
            for r in range(num_skipped + 1)
        ]
        ways.insert(0, row)
    return ways


def _normalised(skipped: frozenset[tuple[int, Part]]) -> frozenset[tuple[int, Part]]:
    parts_of: dict[int, set[Part]] = {}
    for layer, part in skipped:
        parts_of.setdefault(layer, set()).add(part)
    entries: set[tuple[int, Part]] = set()
    for layer, parts in parts_of.items():
        whole = len(parts) > 1 or "layer" in parts
        entries.add((layer, "layer" if whole else next(iter(parts))))
    return frozenset(entries)


def _parse_entry(entry: str, text: str) -> tuple[int, Part]:
    number, dot, part = entry.strip().partition(".")
    if not number.isdecimal():
        raise ValueError(
            f"cannot read {entry.strip()!r} in the layer list {text!r}: expected 0-based layer "
            f"numbers separated by commas, each alone or with a part, as in {_EXAMPLE}"
        )
    if dot and part not in get_args(Part):
        raise ValueError(f"unknown part {part!r} in the layer list {text!r}: {_parts_hint()}")
    return int(number), cast(Part, part or "layer")


def _check_layer(layer: int, num_layers: int) -> None:
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has {num_layers} layers, "
            f"numbered 0 to {num_layers - 1}"
        )


def _parts_hint() -> str:
    return f"write `5` for a whole layer, `5.attention` or `5.mlp` for a part, as in {_EXAMPLE}"
