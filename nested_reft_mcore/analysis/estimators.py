"""The estimators that the atlas compares, each as what a user would configure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from nested_reft_mcore.algorithm.importance import CorrectionSettings
from nested_reft_mcore.algorithm.objectives import ObjectiveSettings
from nested_reft_mcore.algorithm.rejection import RejectionRule
from nested_reft_mcore.analysis.exact_gradients import Sampling
from nested_reft_mcore.analysis.toy_policy import at_temperature, truncated

Section = Literal["correction", "lambda", "rejection", "objective", "sampling"]

TOP_P = 0.9
TEMPERATURE = 0.8
DAMPING = 0.9
"""Lambda of the traces in the rows of section `lambda`."""
THRESHOLD = 2.0
"""Upper bound of ratios in `tis`, `sequence`, `icepop` and the k1 rejections; verl's default."""
_CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


@dataclass(frozen=True)
class Estimator:
    """A row of the atlas."""

    name: str
    section: Section
    settings: ObjectiveSettings
    sample: Callable[[Sampling], Sampling] = lambda sampling: sampling
    """What becomes of the draws and of their record."""


def estimators(max_length: int) -> tuple[Estimator, ...]:
    """All rows of the first table, with Dr. GRPO's constant as the denominator."""

    def settings(**changes: object) -> ObjectiveSettings:
        return ObjectiveSettings(
            loss_agg_mode="seq-mean-token-sum-norm",
            max_response_length=max_length,
            **changes,  # pyright: ignore[reportArgumentType]
        )

    corrections = [
        Estimator(name, "correction", settings(correction=correction, correction_settings=bounds))
        for name, (correction, bounds) in CORRECTION_ROWS.items()
    ]
    rejections = [
        Estimator(f"{rule.name} {_bounds(rule)}", "rejection", settings(rejections=(rule,)))
        for rule in REJECTION_ROWS
    ]
    objectives = [
        Estimator(
            f"{name} in bypass", "objective", settings(objective=name, bypass_mode=True, **_CLIP)
        )
        for name in ("ppo_clip", "cispo", "gspo")
    ]
    damped = [
        Estimator(
            f"{name}, lambda {DAMPING:g}",
            "lambda",
            settings(
                correction=name, correction_settings=CorrectionSettings(retrace_lambda=DAMPING)
            ),
        )
        for name in ("retrace", "retrace_cumulative")
    ]
    samplings = [
        replace(row, name=f"{row.name}, {name}", section="sampling", sample=sample)
        for name, sample in SAMPLING_ROWS.items()
        for row in corrections
    ]
    return (*corrections, *damped, *rejections, *objectives, *samplings)


CORRECTION_ROWS: Mapping[str, tuple[str, CorrectionSettings]] = {
    "practical": ("practical", CorrectionSettings()),
    "base": ("base", CorrectionSettings()),
    "retrace": ("retrace", CorrectionSettings()),
    "retrace_cumulative": ("retrace_cumulative", CorrectionSettings()),
    "tis": ("tis", CorrectionSettings(upper=THRESHOLD)),
    "icepop": ("icepop", CorrectionSettings(lower=1 / THRESHOLD, upper=THRESHOLD)),
    "geometric": ("geometric", CorrectionSettings()),
    "prefix": ("prefix", CorrectionSettings()),
    "sequence": ("trajectory", CorrectionSettings(upper=THRESHOLD)),
    "trajectory": ("trajectory", CorrectionSettings()),
}
"""Row, correction and bounds; `sequence` is verl's name of the truncated trajectory."""

REJECTION_ROWS = (
    RejectionRule("token_k1", THRESHOLD),
    RejectionRule("token_k2", 0.24),
    RejectionRule("token_k3", 0.24),
    RejectionRule("seq_sum_k1", THRESHOLD),
    RejectionRule("seq_sum_k2", 0.24),
    RejectionRule("seq_sum_k3", 0.24),
    RejectionRule("seq_mean_k1", 1.2),
    RejectionRule("seq_mean_k2", 0.05),
    RejectionRule("seq_mean_k3", 0.05),
    RejectionRule("seq_max_k2", 0.24),
    RejectionRule("seq_max_k3", 0.24),
)
"""On top of `practical`; k2 = 0.24 is a ratio of 2 or 1/2."""


def _top_k(sampling: Sampling) -> Sampling:
    table = truncated(sampling.drawn_from, top_k=sampling.space.vocabulary - 1)
    return Sampling(sampling.space, sampling.target, table)


def _top_p(sampling: Sampling) -> Sampling:
    table = truncated(sampling.drawn_from, top_p=TOP_P)
    return Sampling(sampling.space, sampling.target, table)


def _top_p_not_recorded(sampling: Sampling) -> Sampling:
    table = truncated(sampling.drawn_from, top_p=TOP_P)
    return Sampling(sampling.space, sampling.target, table, recorded=sampling.drawn_from)


def _temperature(sampling: Sampling) -> Sampling:
    table = at_temperature(sampling.drawn_from, TEMPERATURE)
    return Sampling(sampling.space, sampling.target, table)


def _temperature_not_recorded(sampling: Sampling) -> Sampling:
    table = at_temperature(sampling.drawn_from, TEMPERATURE)
    return Sampling(sampling.space, sampling.target, table, recorded=sampling.drawn_from)


SAMPLING_ROWS: Mapping[str, Callable[[Sampling], Sampling]] = {
    "top-k, all but one": _top_k,
    f"top-p {TOP_P}": _top_p,
    f"top-p {TOP_P}, not in the ratio": _top_p_not_recorded,
    f"temperature {TEMPERATURE}": _temperature,
    f"temperature {TEMPERATURE}, not in the ratio": _temperature_not_recorded,
}
"""With every correction. `train` refuses top-k and top-p, and takes all log-probs at the sampling
temperature: here the policy that is trained is the one at temperature 1."""


def _bounds(rule: RejectionRule) -> str:
    return f"<= {rule.upper:g}" if not rule.name.endswith("k1") else f"within {rule.upper:g}x"
