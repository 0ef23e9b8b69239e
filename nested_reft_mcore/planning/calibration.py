"""A profile of machines fitted to runs that were timed on them.

Each number of the performance model that a run's times can tell is moved from where it stands in
the profile at hand (best: that of `nested-reft bench hardware`) to where the logarithms of
predicted and measured seconds differ least, in the sense of least squares. What the runs do not
tell stays near where it was: every number has a width, in logarithms, within which it is believed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.least_squares import Array, Fit, least_squares
from nested_reft_mcore.planning.measured_run import MeasuredRun

_NOISE = 0.05
"""Deviation of the logarithm of a measured time: what a few steps on a quiet machine scatter by."""
_UNTOLD = 0.7
"""A value whose deviation is more than this share of its width is not told by the runs."""
_TINY = 1e-9
_ROOM = 8.0
"""Peaks are out of reach by this factor while shares of them are fitted."""
_SHARES_OF = {
    ("peak_tflops", "peak_tflops_float32"): ("matmul_efficiency", "decode_matmul_efficiency"),
    ("memory_gb_per_s",): ("decode_efficiency", "optimizer_efficiency"),
}
_PEAKS = tuple(name for peaks in _SHARES_OF for name in peaks)
_SHARES = tuple(name for shares in _SHARES_OF.values() for name in shares)


@dataclass(frozen=True)
class Knob:
    """A number that is fitted, on a logarithmic scale."""

    name: str
    """Of an assumption, or of a field of the profile."""
    lower: float
    upper: float
    width: float
    """Deviation of the logarithm that it is believed to have before any run is seen."""
    start: float | None = None
    """Where it starts if the profile has 0, which has no logarithm."""
    is_field: bool = False
    wants: Callable[[MeasuredRun], bool] = lambda run: True
    """Whether a run can tell anything of it."""


def _is_split(run: MeasuredRun) -> bool:
    return run.layout.pipeline > 1


def _is_crowded(run: MeasuredRun) -> bool:
    return run.layout.world_size > 1


def _is_sharded(run: MeasuredRun) -> bool:
    return run.layout.tensor > 1


GENERATION = (
    Knob("decode_matmul_efficiency", 1e-3, 1.0, 0.7),
    Knob("decode_efficiency", 1e-3, 1.0, 0.4),
    Knob("layer_overhead_us", 1.0, 1e5, 2.0, start=50.0),
    Knob("pass_overhead_us", 1.0, 1e6, 2.0, start=300.0),
    Knob("row_overhead_us", 0.05, 1e4, 2.0, start=5.0),
    Knob("message_latency_us", 1.0, 1e5, 1.0, start=50.0, wants=_is_split),
    Knob("message_overhead_us", 1.0, 1e6, 2.0, start=100.0, wants=_is_split),
    Knob("all_reduce_latency_us", 1.0, 1e5, 1.0, start=20.0, wants=_is_sharded),
    Knob("busy_compute_share", 0.1, 1.0, 0.1, is_field=True, wants=_is_crowded),
)
UPDATE = (
    Knob("matmul_efficiency", 1e-3, 1.0, 0.7),
    Knob("update_layer_overhead_us", 1.0, 1e6, 2.0, start=300.0),
    Knob("micro_batch_overhead_us", 1.0, 1e6, 2.0, start=1000.0),
    Knob("activation_traffic", 0.01 * _ROOM, 50.0 * _ROOM, 2.0, start=_ROOM),
    Knob("optimizer_efficiency", 1e-3, 1.0, 0.7),
    Knob("update_overhead_ms", 0.01, 1e4, 2.0, start=5.0),
)
REST = (
    Knob("reward_seconds", 1e-6, 100.0, 2.0, start=1e-3),
    Knob("step_overhead_ms", 0.01, 1e5, 2.0, start=5.0),
)
_GROUPS: tuple[tuple[str, tuple[Knob, ...], tuple[str, ...]], ...] = (
    ("generation", GENERATION, ("generation",)),
    ("log-probs and update", UPDATE, ("logprobs", "update")),
    ("rest", REST, ("rest",)),
)


@dataclass(frozen=True)
class FittedValue:
    """One number before and after."""

    name: str
    before: float
    after: float
    factor: float
    """It lies within this factor, up or down, with a probability of two thirds."""
    source: str
    """Which times tell it, or that none do."""
    is_told: bool


@dataclass(frozen=True)
class Calibration:
    """A profile, and where its numbers come from."""

    profile: HardwareProfile
    values: tuple[FittedValue, ...]
    run_names: tuple[str, ...]


def calibrate(runs: Sequence[MeasuredRun], start: HardwareProfile, name: str) -> Calibration:
    """Fit a profile to runs.

    Args:
        runs: Two at least; the more sizes, layouts and skip ratios, the more they tell.
        start: The profile at hand. Without `product_shares` it gets one for all rows, so that
            decoding has a rate of its own. Peaks are raised where the runs reach more.
        name: Of the new profile.

    Raises:
        UserError: too few runs, or times that no number within its bounds explains.
    """
    if len(runs) < 2:
        raise UserError(f"calibration: {len(runs)} runs; expected 2 or more")
    profile = with_room(start)
    values: list[FittedValue] = []
    for title, knobs, parts in _GROUPS:
        profile, found = _fit_group(runs, profile, title, knobs, parts)
        values += found
    profile = without_room(profile, start)
    values = [_in_shares_of(value, start, profile) for value in values]
    profile, found = _measured_lengths(runs, profile)
    values += found
    names = tuple(run.name for run in runs)
    source = f"{start.source}; calibrated on {len(runs)} runs".lstrip("; ")
    profile = profile.model_copy(update={"name": name, "source": source})
    return Calibration(profile, tuple(values), names)


def with_values(profile: HardwareProfile, values: Mapping[str, float]) -> HardwareProfile:
    """A profile with fields and assumptions replaced, by name."""
    fields = {key: value for key, value in values.items() if key in type(profile).model_fields}
    others = {key: value for key, value in values.items() if key not in fields}
    assumptions = profile.assumptions.model_copy(update=others)
    return profile.model_copy(update={**fields, "assumptions": assumptions})


def with_room(profile: HardwareProfile) -> HardwareProfile:
    """The same machine with peaks that are out of reach, and shares of them to match.

    A peak may have been measured on a busy day: what runs reach must be able to lie above it.
    """
    update: dict[str, Any] = {name: value_of(profile, name) * _ROOM for name in _PEAKS}
    if not profile.product_shares:
        # Decoding gets a rate of its own, which starts where an update's is.
        share = profile.assumptions.matmul_efficiency
        update["product_shares"] = ((1.0, share),)
    shares = {name: value_of(profile, name) / _ROOM for name in _SHARES}
    # It counts passes over memory, which seem to take no time there.
    shares["activation_traffic"] = profile.assumptions.activation_traffic * _ROOM
    return with_values(profile.model_copy(update=update), shares)


def without_room(profile: HardwareProfile, start: HardwareProfile) -> HardwareProfile:
    """Peaks as they were, or as high as what the runs have reached; shares to match."""
    values: dict[str, float] = {}
    for peaks, shares in _SHARES_OF.items():
        reached = [_ROOM * value_of(profile, name) for name in shares]
        factor = max(1.0, *reached)
        values |= {name: value_of(start, name) * factor for name in peaks}
        values |= {name: share / factor for name, share in zip(shares, reached, strict=True)}
    slower = _ROOM * start.memory_gb_per_s / values["memory_gb_per_s"]
    values["activation_traffic"] = profile.assumptions.activation_traffic / slower
    return with_values(profile, values)


def _in_shares_of(
    value: FittedValue, start: HardwareProfile, profile: HardwareProfile
) -> FittedValue:
    """A fitted share as the profiles before and after have it."""
    if value.name not in (*_SHARES, "activation_traffic"):
        return value
    before, after = (value_of(one, value.name) for one in (start, profile))
    return replace(value, before=before, after=after)


def value_of(profile: HardwareProfile, name: str) -> float:
    """A field or an assumption."""
    holder: Any = profile if name in type(profile).model_fields else profile.assumptions
    return float(getattr(holder, name))


def _fit_group(
    runs: Sequence[MeasuredRun],
    profile: HardwareProfile,
    title: str,
    knobs: Sequence[Knob],
    parts: Sequence[str],
) -> tuple[HardwareProfile, list[FittedValue]]:
    """Fit some numbers to some parts of the steps."""
    timed = [(run, part) for run in runs for part in parts if run.seconds[part] > 0]
    used = [knob for knob in knobs if any(knob.wants(run) for run, _ in timed)]
    if not timed or not used:
        return profile, []
    before = [value_of(profile, knob.name) for knob in used]
    start = np.log([_start_of(knob, value) for knob, value in zip(used, before, strict=True)])
    lower, upper = (np.log([getattr(knob, end) for knob in used]) for end in ("lower", "upper"))
    widths = np.asarray([knob.width for knob in used])
    weights = np.asarray([_weight(run, part) for run, part in timed])
    measured = np.log([run.seconds[part] for run, part in timed])

    def residuals(logs: Array) -> Array:
        tried = with_values(profile, _named(used, logs))
        logs_of = np.log([_predicted(run, part, tried) for run, part in timed])
        return np.concatenate([weights * (logs_of - measured), (logs - start) / widths])

    fit = least_squares(residuals, start, lower, upper)
    fitted = with_values(profile, _named(used, fit.values))
    return fitted, _describe(used, before, fit, title, len(timed))


def _describe(
    used: Sequence[Knob], before: Sequence[float], fit: Fit, title: str, count: int
) -> list[FittedValue]:
    found = []
    for knob, old, log, deviation in zip(used, before, fit.values, fit.deviations, strict=True):
        is_told = deviation < _UNTOLD * knob.width
        source = f"{title} of {count} times" if is_told else "hardly told by these runs"
        factor = math.exp(min(deviation, knob.width))
        found.append(FittedValue(knob.name, old, math.exp(log), factor, source, is_told))
    return found


def _measured_lengths(
    runs: Sequence[MeasuredRun], profile: HardwareProfile
) -> tuple[HardwareProfile, list[FittedValue]]:
    """Mean lengths over their limits: read, not fitted."""
    fills: dict[str, list[float]] = {"prompt_fill": [], "response_fill": []}
    for run in runs:
        prompts, responses = run.expected.prompts, run.expected.responses
        lengths = [length for group in responses for length in group]
        limits = run.config.data.max_prompt_length, run.config.rollout.max_new_tokens
        fills["prompt_fill"].append(min(1.0, statistics.fmean(prompts) / limits[0]))
        fills["response_fill"].append(min(1.0, statistics.fmean(lengths) / limits[1]))
    means = {name: max(_TINY, statistics.median(values)) for name, values in fills.items()}
    found = [
        FittedValue(
            name,
            value_of(profile, name),
            mean,
            max(values) / mean if max(values) > mean else 1.0,
            f"lengths of {len(runs)} runs, the median",
            True,
        )
        for (name, values), mean in zip(fills.items(), means.values(), strict=True)
    ]
    return with_values(profile, means), found


def _predicted(run: MeasuredRun, part: str, profile: HardwareProfile) -> float:
    """Seconds of one part; no more of the model is asked than the part needs."""
    model = run.model(profile)
    if part == "generation":
        times = [model.decode.seconds(plan) for plan, n in run.plans.items() for _ in range(n)]
        return max(_TINY, statistics.median(times))
    return max(_TINY, float(getattr(model.step_with(0.0), part)))


def _weight(run: MeasuredRun, part: str) -> float:
    """One over the deviation of its logarithm; small parts of a step count for less."""
    share = run.seconds[part] / max(run.step_seconds, _TINY)
    return math.sqrt(min(1.0, share)) / _NOISE


def _start_of(knob: Knob, value: float) -> float:
    if value <= 0:
        assert knob.start is not None, f"{knob.name} is above 0"
        value = knob.start
    return min(max(value, knob.lower), knob.upper)


def _named(knobs: Sequence[Knob], logs: Array) -> dict[str, float]:
    return {knob.name: math.exp(log) for knob, log in zip(knobs, logs.tolist(), strict=True)}
