"""What a run has found: every single measurement, and the figures that follow from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nested_reft_mcore.bench.cases import FULL, Case, all_key
from nested_reft_mcore.bench.ceiling import skipped_share, speedup_ceiling
from nested_reft_mcore.bench.hardware import Machine, StepBound
from nested_reft_mcore.bench.workload import Timing, Workload


@dataclass(frozen=True)
class ModelFacts:
    """The model, as far as its speed depends on it."""

    num_layers: int
    num_parameters: int
    """Of the whole model."""
    num_product_weights: int
    """Numbers of the matrices that every decoded token meets, the head among them."""
    product_weight_bytes: int
    """What they take."""


@dataclass(frozen=True)
class Row:
    """One case: medians over its runs, and what arithmetic allows."""

    key: str
    part: str | None
    num_skipped: int
    percentages: tuple[float, ...]
    plan: str
    seconds: tuple[float, ...]
    """Wall-clock time of every run, prefill included."""
    step_seconds: tuple[float, ...]
    """Decoding one token of all sequences, of every run."""
    tokens_per_second: float
    """From the median; of decoding alone where that is what is compared."""
    spread: tuple[float, float]
    """Tokens per second of the slowest and the fastest run."""
    speedup: float
    """Against full depth."""
    ceiling: float | None
    """Largest speed-up that the skippable work allows; None where everything is skipped."""
    ratio: float | None
    """`speedup / ceiling`."""
    waiting_shares: tuple[float, ...]
    """By stage, the share of the time spent waiting for another one; the median."""
    kv_cache_bytes: tuple[int, ...]
    """By stage, as the engine has allocated them."""
    kv_formula_bytes: tuple[int, ...]
    """By stage, what the active attentions need for the slots that there were."""


@dataclass(frozen=True)
class PeerRow:
    """A peer on the same prompts and weights."""

    name: str
    version: str | None
    seconds: tuple[float, ...]
    tokens_per_second: float | None
    """From the median; None where it was not measured."""
    ours_over_theirs: float | None
    reason: str | None
    """Why it was not measured."""


@dataclass(frozen=True)
class WorkloadResult:
    """All rows of one workload."""

    name: str
    workload: Workload
    context: int | None
    """Set where decoding alone is compared, at this many positions."""
    rows: tuple[Row, ...]
    peers: tuple[PeerRow, ...]


@dataclass(frozen=True)
class DecodeStep:
    """One decoded token of all sequences at full depth, against what the machine can do."""

    rows: int
    seconds: float
    bound: StepBound
    fraction: float
    """`bound.seconds / seconds`."""


@dataclass(frozen=True)
class Results:
    """Everything, as it is written to JSON."""

    what: str
    options: dict[str, Any]
    environment: dict[str, Any]
    num_threads: int
    """Of all processes together."""
    native_kernels: bool
    """Whether all processes decoded with the native kernels."""
    model: ModelFacts
    machine: Machine
    decode_step: DecodeStep | None
    workloads: tuple[WorkloadResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


def make_rows(
    cases: Sequence[Case],
    timings: dict[str, list[Timing]],
    workload: Workload,
    stage_of_layer: Sequence[int],
    kv_formula: Sequence[tuple[int, ...]],
    *,
    decode_only: bool,
) -> tuple[Row, ...]:
    """A row for every case; `decode_only` compares decoding instead of whole generations."""

    def times(key: str) -> list[float]:
        runs = timings[key]
        steps = [run.step_seconds for run in runs if run.step_seconds is not None]
        return steps if decode_only else [run.seconds for run in runs]

    num_tokens = workload.num_sequences if decode_only else workload.num_tokens
    full = statistics.median(times(FULL))
    rows = []
    for case, formula in zip(cases, kv_formula, strict=True):
        found = times(case.key)
        speedup = full / statistics.median(found)
        ceiling = None
        if case.part is None:
            ceiling = 1.0
        elif case.percentages:
            least = statistics.median(times(all_key(case.part)))
            share = skipped_share(case.plan, stage_of_layer, case.part)
            ceiling = speedup_ceiling(full, least, share)
        runs = timings[case.key]
        rows.append(
            Row(
                key=case.key,
                part=case.part,
                num_skipped=case.num_skipped,
                percentages=case.percentages,
                plan=case.plan.describe(),
                seconds=tuple(run.seconds for run in runs),
                step_seconds=tuple(
                    run.step_seconds for run in runs if run.step_seconds is not None
                ),
                tokens_per_second=num_tokens / statistics.median(found),
                spread=(num_tokens / max(found), num_tokens / min(found)),
                speedup=speedup,
                ceiling=ceiling,
                ratio=None if ceiling is None else speedup / ceiling,
                waiting_shares=_medians([run.waiting_shares for run in runs]),
                kv_cache_bytes=runs[-1].kv_cache_bytes,
                kv_formula_bytes=formula,
            )
        )
    return tuple(rows)


def make_peer_row(
    name: str,
    version: str | None,
    seconds: Sequence[float | None],
    reason: str | None,
    workload: Workload,
    ours: float,
) -> PeerRow:
    """A peer's medians; `ours` are our tokens per second at full depth. None in `seconds` fails."""
    found = tuple(value for value in seconds if value is not None)
    if not found or reason is not None:
        return PeerRow(name, version, found, None, None, reason or "was not measured")
    speed = workload.num_tokens / statistics.median(found)
    return PeerRow(name, version, found, speed, ours / speed, None)


def make_decode_step(
    rows: Sequence[Row], workload: Workload, bound: StepBound
) -> DecodeStep | None:
    """The decode step of the full-depth row; None where too few tokens were generated to see it."""
    steps = next(row.step_seconds for row in rows if row.key == FULL)
    if not steps:
        return None
    seconds = statistics.median(steps)
    return DecodeStep(workload.num_sequences, seconds, bound, bound.seconds / seconds)


def _medians(shares: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(statistics.median(stage) for stage in zip(*shares, strict=True))
