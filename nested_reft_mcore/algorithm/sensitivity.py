"""The plan law `sensitivity`: what saves the most time for a budget of KL, drawn at random.

Every layer offers up to three ways to skip it (whole, attention, mlp), each with a measured KL and
a measured time. A plan picks at most one of them for each layer. Two things bound it:

- its predicted KL (`kl_interaction`) stays within the budget, which is a bound on the sum of KLs;
- the slowest pipeline stage, which sets the pace, becomes nearly as fast as any such plan makes it:
  of the best plan's saving at most the share `saving_tolerance` is given up. No stage skips more
  than pays, so a stage that is quick anyhow costs no KL.

The law is uniform over all plans that fulfil both, the largest entropy there is. Plans are counted
by dynamic programming over layers, in integers, so drawing is exact and so are the inclusion
probabilities. KLs are rounded up to 1/512 of the budget, times down to 1/1024 of the slowest stage.

A count for every KL that is left is one long integer with a field for each of them: adding such
integers adds all counts at once, shifting one by a field spends one unit of KL.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from nested_reft_mcore.algorithm.counter_random import integer_below
from nested_reft_mcore.algorithm.kl_interaction import KlInteraction
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, Part

KL_UNITS = 512
TIME_UNITS = 1024
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SkipOption:
    """One way to skip something of a layer."""

    layer: int
    part: Part
    kl: float
    """Nats per token of skipping this alone, against the full policy."""
    seconds: float
    """What a decode pass of the layer's stage takes less."""


@dataclass(frozen=True)
class _Choice:
    """An option in whole units; the first choice of every layer is to skip nothing."""

    part: Part | None
    kl: int
    saving: int


@dataclass(frozen=True)
class _Position:
    """A layer in the order in which plans are counted: stage by stage."""

    layer: int
    choices: tuple[_Choice, ...]
    least: int
    """Units of time that its stage has to save."""
    most: int
    """Units that it may save."""
    is_last: bool
    """Of its stage."""


@dataclass(frozen=True)
class SensitivityLaw:
    """Draws plans; a pure function of its fields. Equal fields give equal plans on every process.

    Raises ValueError for fields that do not fit the model, and where the budget buys nothing.
    """

    num_layers: int
    options: tuple[SkipOption, ...]
    """Every measured (layer, part), each once, in any order."""
    layer_seconds: float
    """A decode pass of one whole layer."""
    stage_of_layer: tuple[int, ...]
    """The physical pipeline rank of each global layer."""
    kl_budget: float
    """Largest predicted KL of a plan, nats per token."""
    interaction: KlInteraction = field(default_factory=KlInteraction)
    stage_extra_seconds: tuple[float, ...] | None = None
    """What each stage spends besides its layers."""
    border_layers: int = 0
    """Layers at either end that are never skipped."""
    protected_layers: tuple[int, ...] = ()
    """Other layers that are never skipped."""
    saving_tolerance: float = 0.2
    """Share of the best plan's saving that a plan may lack; the larger, the more plans."""

    def __post_init__(self) -> None:
        if len(self.stage_of_layer) != self.num_layers or min(self.stage_of_layer) < 0:
            raise ValueError(
                f"stage_of_layer needs a stage from 0 up for each of {self.num_layers} layers, "
                f"got {list(self.stage_of_layer)}"
            )
        if not 0 < self.kl_budget < math.inf:
            raise ValueError(f"kl_budget must be positive and finite, found {self.kl_budget}")
        if not 0 <= self.saving_tolerance < 1:
            raise ValueError(
                f"saving_tolerance is a share from 0 up and below 1, found {self.saving_tolerance}"
            )
        if self.layer_seconds <= 0 or any(extra < 0 for extra in self._extra_seconds):
            raise ValueError("a layer takes a positive time, and what stages add is not negative")
        pairs = [(option.layer, option.part) for option in self.options]
        if len(set(pairs)) < len(pairs):
            raise ValueError("the same part of a layer is measured twice")
        for option in self.options:
            # The plan's own check names the layer or part that there is not.
            LayerSkipPlan(self.num_layers, frozenset({(option.layer, option.part)}))
            if not (math.isfinite(option.kl) and math.isfinite(option.seconds)):
                raise ValueError(f"layer {option.layer}.{option.part}: not finite: {option}")
        if self._best_level >= TIME_UNITS:
            raise ValueError(self._why_nothing())

    def draw(self, key: tuple[int, ...]) -> LayerSkipPlan:
        """The plan that belongs to `key`: one number below the count of plans, taken apart."""
        state, budget = self._start, KL_UNITS
        ticket = integer_below(self.num_plans, *key)
        skipped: set[tuple[int, Part]] = set()
        for place, position in enumerate(self._positions):
            for choice in position.choices:
                after = self._after(place, state, choice)
                if after is None or choice.kl > budget:
                    continue
                share = self._count(place + 1, after, budget - choice.kl)
                if ticket < share:
                    break
                ticket -= share
            else:
                raise AssertionError("a ticket is below the number of plans")
            state, budget = after, budget - choice.kl
            if choice.part is not None:
                skipped.add((position.layer, choice.part))
        return LayerSkipPlan(self.num_layers, frozenset(skipped))

    @property
    def num_plans(self) -> int:
        """How many plans there are; each is drawn with the same probability."""
        return self._count(0, self._start, KL_UNITS)

    def predicted_kl(self, plan: LayerSkipPlan) -> float:
        """Nats per token, from the options' own KL and the interaction.

        Raises ValueError where something skipped was not measured.
        """
        return self.interaction.predict(self.total_kl(plan))

    def total_kl(self, plan: LayerSkipPlan) -> float:
        """Sum of what the skipped parts cost alone, nats per token; ValueError as above."""
        known = {(option.layer, option.part): option.kl for option in self.options}
        unknown = plan.skipped - known.keys()
        if unknown:
            raise ValueError(f"the KL of skipping {sorted(unknown)} was not measured")
        return sum(max(known[entry], 0.0) for entry in sorted(plan.skipped))

    def stage_seconds(self, plan: LayerSkipPlan) -> list[float]:
        """What a decode pass of each stage takes under the plan."""
        saved = {(option.layer, option.part): option.seconds for option in self.options}
        seconds = list(self._full_seconds)
        for layer, part in sorted(plan.skipped):
            seconds[self.stage_of_layer[layer]] -= saved[layer, part]
        return seconds

    def predicted_speedup(self, plan: LayerSkipPlan) -> float:
        """Time of the slowest stage of the full model over that of the slowest under the plan."""
        remaining = max(self.stage_seconds(plan))
        return max(self._full_seconds) / remaining if remaining > 0 else math.inf

    def part_probabilities(self) -> dict[tuple[int, Part], float]:
        """Probability that `draw` skips each (layer, part) as such; exact, from counts of plans."""
        probabilities: dict[tuple[int, Part], float] = {
            (o.layer, o.part): 0.0 for o in self.options
        }
        width, mask = self._field_bits, self._mask
        one_field = (1 << width) - 1
        total = self.num_plans
        prefixes: dict[int, int] = {self._start: 1}
        for place, position in enumerate(self._positions):
            later: dict[int, int] = {}
            for choice in position.choices:
                count = 0
                for state, prefix in prefixes.items():
                    after = self._after(place, state, choice)
                    if after is None or after not in self._ways[place + 1]:
                        continue
                    if choice.part is not None and choice.kl <= KL_UNITS:
                        # Pairs of beginnings and ends whose KLs fill the rest of the budget.
                        pairs = prefix * self._ways[place + 1][after]
                        count += (pairs >> (width * (KL_UNITS - choice.kl))) & one_field
                    spent = (prefix << (width * choice.kl)) & mask
                    later[after] = later.get(after, 0) + spent
                if choice.part is not None:
                    probabilities[position.layer, choice.part] = count / total
            prefixes = later
        return probabilities

    def inclusion_probabilities(self) -> list[float]:
        """Probability that something of each layer is skipped."""
        found = [0.0] * self.num_layers
        for (layer, _), probability in self.part_probabilities().items():
            found[layer] += probability
        return found

    @cached_property
    def pool(self) -> tuple[SkipOption, ...]:
        """The options that plans may use: neither protected nor dearer than the whole budget."""
        return tuple(option for option in self._free if self._kl_units(option) <= KL_UNITS)

    @cached_property
    def _free(self) -> tuple[SkipOption, ...]:
        """The options that save time and are not protected, whatever they cost."""
        inner = range(self.border_layers, self.num_layers - self.border_layers)
        allowed = frozenset(inner) - frozenset(self.protected_layers)
        return tuple(
            option
            for option in sorted(self.options, key=lambda option: (option.layer, option.part))
            if option.layer in allowed and self._time_units(option.seconds) > 0
        )

    @cached_property
    def _extra_seconds(self) -> tuple[float, ...]:
        num_stages = max(self.stage_of_layer) + 1
        extra = self.stage_extra_seconds or (0.0,) * num_stages
        if len(extra) < num_stages:
            raise ValueError(f"stage_extra_seconds needs {num_stages} entries, got {list(extra)}")
        return extra

    @cached_property
    def _full_seconds(self) -> tuple[float, ...]:
        counts = [self.stage_of_layer.count(stage) for stage in range(len(self._extra_seconds))]
        pairs = zip(counts, self._extra_seconds, strict=True)
        return tuple(count * self.layer_seconds + extra for count, extra in pairs)

    def _kl_units(self, option: SkipOption) -> int:
        """Rounded up: a sum of units within KL_UNITS is a sum of KLs within the budget."""
        share = max(option.kl, 0.0) / self.interaction.total_within(self.kl_budget)
        return math.ceil(min(share * KL_UNITS, KL_UNITS + 1) - _ROUNDING)

    def _time_units(self, seconds: float) -> int:
        """Rounded down: what is saved in units is really saved."""
        return math.floor(seconds / max(self._full_seconds) * TIME_UNITS + _ROUNDING)

    @cached_property
    def _stage_choices(self) -> list[dict[int, list[_Choice]]]:
        """For each stage the choices of each layer that has any."""
        stages: list[dict[int, list[_Choice]]] = [{} for _ in self._full_seconds]
        for option in self.pool:
            layers = stages[self.stage_of_layer[option.layer]]
            choices = layers.setdefault(option.layer, [_Choice(None, 0, 0)])
            saving = self._time_units(option.seconds)
            choices.append(_Choice(option.part, self._kl_units(option), saving))
        return stages

    def _needed(self, stage: int, level: float) -> int:
        """Units that a stage has to save to take at most `level` units."""
        full = self._full_seconds[stage] / max(self._full_seconds) * TIME_UNITS
        return max(0, math.ceil(full - level - _ROUNDING))

    @cached_property
    def _best_level(self) -> int:
        """The fewest units that the slowest stage can take within the budget."""
        costs = [_least_costs(layers.values()) for layers in self._stage_choices]
        low, high = 0, TIME_UNITS
        while low < high:
            level = (low + high) // 2
            needs = [self._needed(stage, level) for stage in range(len(costs))]
            spent = sum(
                cost[need] if need < len(cost) else math.inf
                for cost, need in zip(costs, needs, strict=True)
            )
            low, high = (low, level) if spent <= KL_UNITS else (level + 1, high)
        return low

    @cached_property
    def _positions(self) -> tuple[_Position, ...]:
        best = self._best_level
        worst = best + self.saving_tolerance * (TIME_UNITS - best)
        positions: list[_Position] = []
        for stage, layers in enumerate(self._stage_choices):
            need = self._needed(stage, best)
            if need == 0:
                continue
            # A plan that saves more than this would still be fast enough without one of its parts.
            largest = max(choice.saving for choices in layers.values() for choice in choices)
            window = (self._needed(stage, worst), need + largest - 1)
            for layer, choices in layers.items():
                is_last = layer == list(layers)[-1]
                positions.append(_Position(layer, tuple(choices), *window, is_last))
        return tuple(positions)

    @property
    def _start(self) -> int:
        return self._positions[0].least

    def _after(self, place: int, state: int, choice: _Choice) -> int | None:
        """What is still to be saved after a choice; None where no plan goes on from there."""
        position = self._positions[place]
        state -= choice.saving
        if state < position.least - position.most:
            return None
        if not position.is_last:
            return state
        if state > 0:
            return None
        return self._positions[place + 1].least if place + 1 < len(self._positions) else 0

    @cached_property
    def _field_bits(self) -> int:
        """Bits of a count: no count exceeds the number of all plans."""
        plans = math.prod(len(position.choices) for position in self._positions)
        return plans.bit_length() + 1

    @cached_property
    def _mask(self) -> int:
        return (1 << (self._field_bits * (KL_UNITS + 1))) - 1

    @cached_property
    def _ways(self) -> list[dict[int, int]]:
        """`_ways[place][state]`: field k counts the ways to go on that cost at most k units."""
        reachable: list[set[int]] = [{self._start}]
        for place, position in enumerate(self._positions):
            steps = (self._after(place, s, c) for s in reachable[-1] for c in position.choices)
            reachable.append({state for state in steps if state is not None})
        width, mask = self._field_bits, self._mask
        everywhere = sum(1 << (width * units) for units in range(KL_UNITS + 1))
        tables: list[dict[int, int]] = [{0: everywhere}]
        for place in reversed(range(len(self._positions))):
            table: dict[int, int] = {}
            for state in reachable[place]:
                ways = 0
                for choice in self._positions[place].choices:
                    after = self._after(place, state, choice)
                    if after is not None:
                        ways += (tables[0].get(after, 0) << (width * choice.kl)) & mask
                if ways:
                    table[state] = ways
            tables.insert(0, table)
        return tables

    def _count(self, place: int, state: int, budget: int) -> int:
        """Ways to go on within so many units of KL."""
        ways = self._ways[place].get(state, 0)
        return (ways >> (self._field_bits * budget)) & ((1 << self._field_bits) - 1)

    def _why_nothing(self) -> str:
        if not self.pool:
            cheapest = min(self._free, key=lambda option: option.kl, default=None)
            least = (
                "there is none that saves time"
                if cheapest is None
                else (
                    f"the cheapest, {cheapest.part} of layer {cheapest.layer}, costs "
                    f"{self.interaction.predict(cheapest.kl):.3g}"
                )
            )
            return (
                f"a KL budget of {self.kl_budget:g} nats per token buys no part outside of the "
                f"borders and protected layers: {least}"
            )
        slowest = self._full_seconds.index(max(self._full_seconds))
        return (
            f"a KL budget of {self.kl_budget:g} nats per token makes the slowest stage "
            f"({slowest}) no faster: too little of it may be skipped"
        )


def _least_costs(layers: Collection[list[_Choice]]) -> list[float]:
    """`[r]`: the fewest units of KL that save at least r units of time; infinite where none do."""
    most = sum(max(choice.saving for choice in choices) for choices in layers)
    costs: list[float] = [0.0] + [math.inf] * most
    for choices in layers:
        costs = [
            min(choice.kl + costs[max(0, need - choice.saving)] for choice in choices)
            for need in range(most + 1)
        ]
    return costs
