"""Correction and rejection as a configuration spells them, read into names and bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import AlgorithmConfig

REJECTIONS = (
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
)
"""What `algorithm.rollout_rs` may name; the same as `algorithm.rejection.REJECTIONS`."""

_ALIASES = {"token": "tis", "sequence": "trajectory"}
_DEFAULT_BOUNDS = {"tis": (0.0, 2.0), "sequence": (0.0, 2.0), "icepop": (0.5, 5.0)}
_WITH_UPPER = ("tis", "trajectory", "prefix", "geometric")


@dataclass(frozen=True)
class CorrectionChoice:
    """A correction by its own name, and its bounds."""

    name: str
    lower: float
    upper: float


@dataclass(frozen=True)
class RejectionChoice:
    """A rejection and its bounds; `lower` only where two were given."""

    name: str
    lower: float | None
    upper: float


def read_correction(config: AlgorithmConfig) -> CorrectionChoice:
    """The correction that `rollout_is` and `rollout_is_threshold` ask for.

    As in verl, `token` with two bounds is IcePop.

    Raises:
        UserError: the threshold cannot be read, or the correction has none.
    """
    key, threshold = "algorithm.rollout_is_threshold", config.rollout_is_threshold
    name = _ALIASES.get(config.rollout_is, config.rollout_is)
    if threshold is None:
        default = _DEFAULT_BOUNDS.get(config.rollout_is, _DEFAULT_BOUNDS.get(name, (0.0, math.inf)))
        return CorrectionChoice(name, *default)
    lower, upper = _bounds(key, str(threshold))
    if config.rollout_is == "token" and lower is not None:
        name = "icepop"
    if name == "icepop":
        if lower is None:
            raise UserError(
                f'{key}={threshold}: icepop keeps ratios between two bounds, as in "0.5_5"'
            )
        _check_around_one(key, str(threshold), "icepop", lower, upper)
        return CorrectionChoice(name, lower, upper)
    if name not in _WITH_UPPER:
        raise UserError(
            f"{key}={threshold}: algorithm.rollout_is={config.rollout_is} has no threshold; those "
            f"that have one: {', '.join((*_WITH_UPPER, 'sequence', 'token', 'icepop'))}"
        )
    if lower is not None:
        raise UserError(
            f"{key}={threshold}: {config.rollout_is} has an upper bound only; expected one number"
        )
    return CorrectionChoice(name, 0.0, upper)


def read_rejections(config: AlgorithmConfig) -> tuple[RejectionChoice, ...]:
    """The rejections that `rollout_rs` and `rollout_rs_threshold` ask for, in order.

    One threshold serves all of them; otherwise there is one for each.

    Raises:
        UserError: an unknown name, or thresholds that are missing, too many or impossible.
    """
    key = "algorithm.rollout_rs_threshold"
    names = _entries(config.rollout_rs or "")
    if config.rollout_rs is not None and not names:
        raise UserError(
            f"algorithm.rollout_rs={config.rollout_rs!r} names no rejection; expected a "
            f"comma-separated list of {', '.join(REJECTIONS)}, or null"
        )
    thresholds = _entries(
        "" if config.rollout_rs_threshold is None else str(config.rollout_rs_threshold)
    )
    for name in names:
        if name not in REJECTIONS:
            raise UserError(
                f"algorithm.rollout_rs: unknown rejection {name!r}; expected a comma-separated "
                f"list of {', '.join(REJECTIONS)}"
            )
    if not names:
        if thresholds:
            raise UserError(f"{key} is set, but algorithm.rollout_rs names no rejection")
        return ()
    if len(thresholds) not in (1, len(names)):
        raise UserError(
            f"{key}: {len(names)} rejections in algorithm.rollout_rs and {len(thresholds)} "
            "thresholds; expected one for all, or one for each"
        )
    if len(thresholds) == 1:
        thresholds = thresholds * len(names)
    return tuple(_rejection(key, n, t) for n, t in zip(names, thresholds, strict=True))


def _rejection(key: str, name: str, threshold: str) -> RejectionChoice:
    lower, upper = _bounds(key, threshold)
    if lower is not None and not name.endswith("k1"):
        raise UserError(
            f"{key}={threshold}: {name} is never negative and has an upper bound only; expected "
            "one number"
        )
    if lower is None and name.endswith("k1") and upper <= 1:
        raise UserError(
            f"{key}={threshold}: {name} with one number keeps ratios from its inverse to it; "
            'expected a number above 1, or two bounds as in "0.5_2"'
        )
    if lower is not None:
        _check_around_one(key, threshold, name, lower, upper)
    return RejectionChoice(name, lower, upper)


def _check_around_one(key: str, text: str, name: str, lower: float, upper: float) -> None:
    """Ratios of rollouts without any lag are 1: bounds that leave it out keep nothing of them."""
    if not lower <= 1 <= upper:
        raise UserError(
            f"{key}={text}: {name} with these bounds drops what is on-policy, whose ratio is 1; "
            'expected bounds on both sides of it, as in "0.5_2"'
        )


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def _bounds(key: str, text: str) -> tuple[float | None, float]:
    """`2` is an upper bound, `0.5_2` are both."""
    parts = text.strip().split("_")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < n < math.inf for n in numbers):
        raise UserError(f'{key}={text}: expected a positive number, or two as in "0.5_2"')
    if len(numbers) == 1:
        return None, numbers[0]
    if numbers[0] >= numbers[1]:
        raise UserError(f"{key}={text}: the lower bound is not below the upper one")
    return numbers[0], numbers[1]
