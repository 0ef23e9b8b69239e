"""From judged completions to figures with intervals, and the names that metrics have."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from nested_reft_mcore.algorithm.accuracy import (
    best_of_k,
    difference_interval,
    majority_reward,
    mean_interval,
)
from nested_reft_mcore.training.evaluation_record import Mode

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

FULL = "full"
"""The policy that skips nothing."""


@dataclass(frozen=True)
class JudgedCompletion:
    """One completion with its verdict."""

    policy: str
    mode: Mode
    dataset: str
    row: int
    sample: int
    reward: float
    answer: int | None
    """Equal for completions of the prompt with equal answers; None without an answer."""
    num_tokens: int
    is_truncated: bool
    labels: tuple[tuple[str, str], ...] = ()
    """Level, subject and the like, as (name, value)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What one policy does on one set, or on the part of it that has a label."""

    dataset: str
    policy: str
    part: str
    """Empty for the whole set, else `level=3`."""
    num_prompts: int
    estimates: Mapping[str, Estimate]
    """By verl's names: greedy, mean@n, best@k/mean (pass@k), maj@n/mean."""
    response_length: Mapping[str, float]
    """Mean tokens of a completion, by greedy and mean@n."""
    clip_ratio: Mapping[str, float]
    """Share of completions that were cut off, by the same."""
    change: Mapping[str, Estimate] = field(default_factory=dict)
    """This policy minus the full one on the same prompts, paired; of policies that skip."""
    measure: str = "reward"
    """What was measured: `reward` is an accuracy, any other name (`weighted_sum`) is none."""

    def metrics(self) -> dict[str, float]:
        """Flat, as they are logged: `val-core/<set>/<measure>/<statistic>`, else `val-aux/...`.

        Ends of intervals have `/low` and `/high` after the name of what they belong to.

        A policy that skips writes `<set>@skip=<plan>` for the set.
        """
        name = self.dataset + ("" if self.policy == FULL else f"@skip={self.policy}")
        core = f"val-aux/{name}/{self.part}" if self.part else f"val-core/{name}"
        aux = f"val-aux/{name}" + (f"/{self.part}" if self.part else "")
        found = {f"{aux}/num_prompts": float(self.num_prompts)}
        for statistic, estimate in self.estimates.items():
            found[f"{core}/{self.measure}/{statistic}"] = estimate.value
            found[f"{core}/{self.measure}/{statistic}/low"] = estimate.low
            found[f"{core}/{self.measure}/{statistic}/high"] = estimate.high
        for statistic, estimate in self.change.items():
            found[f"{aux}/change/{statistic}"] = estimate.value
            found[f"{aux}/change/{statistic}/low"] = estimate.low
            found[f"{aux}/change/{statistic}/high"] = estimate.high
        found |= {f"{aux}/response_length/{mode}": v for mode, v in self.response_length.items()}
        found |= {f"{aux}/clip_ratio/{mode}": v for mode, v in self.clip_ratio.items()}
        return found


def all_figures(completions: Iterable[JudgedCompletion], measure: str = "reward") -> list[Figures]:
    """Figures of every set, policy and label; sets and policies in the order that they come in.

    `measure` says what the completions' `reward` is.

    Every prompt has to have as many completions as the others of its set, policy and mode.
    """
    found: list[Figures] = []
    by_set = _grouped(completions, lambda one: one.dataset)
    for dataset, of_set in by_set.items():
        by_policy = _grouped(of_set, lambda one: one.policy)
        for part in ("", *_parts(of_set)):
            full: dict[str, dict[int, float]] | None = None
            for policy, of_policy in by_policy.items():
                chosen = [one for one in of_policy if not part or part in _labels(one)]
                values = _values_by_prompt(chosen)
                if policy == FULL:
                    full = values
                change = _changes(values, full) if policy != FULL and full is not None else {}
                found.append(_figures(dataset, policy, part, chosen, values, change))
    return [replace(one, measure=measure) for one in found]


def pass_at_k_of(num_samples: int) -> list[int]:
    """The k of best@k for so many samples: powers of two, and all of them."""
    powers = [1 << i for i in range(1, num_samples.bit_length()) if 1 << i < num_samples]
    return [*powers, num_samples] if num_samples > 1 else []


def _figures(
    dataset: str,
    policy: str,
    part: str,
    completions: Sequence[JudgedCompletion],
    values: Mapping[str, Mapping[int, float]],
    change: Mapping[str, Estimate],
) -> Figures:
    lengths: dict[str, float] = {}
    clipped: dict[str, float] = {}
    for mode, of_mode in _grouped(completions, lambda one: one.mode).items():
        name = "greedy" if mode == "greedy" else f"mean@{_num_samples(of_mode)}"
        lengths[name] = _mean([float(one.num_tokens) for one in of_mode])
        clipped[name] = _mean([float(one.is_truncated) for one in of_mode])
    return Figures(
        dataset=dataset,
        policy=policy,
        part=part,
        num_prompts=len({one.row for one in completions}),
        estimates={
            name: Estimate(_mean(list(column.values())), *mean_interval(list(column.values())))
            for name, column in values.items()
        },
        response_length=lengths,
        clip_ratio=clipped,
        change=change,
    )


def _values_by_prompt(
    completions: Sequence[JudgedCompletion],
) -> dict[str, dict[int, float]]:
    """For each statistic its value on each prompt, by the prompt's row."""
    found: dict[str, dict[int, float]] = {}
    for mode, of_mode in _grouped(completions, lambda one: one.mode).items():
        for row, group in sorted(_grouped(of_mode, lambda one: one.row).items()):
            rewards = [one.reward for one in group]
            if mode == "greedy":
                found.setdefault("greedy", {})[row] = rewards[0]
                continue
            n = len(rewards)
            found.setdefault(f"mean@{n}", {})[row] = _mean(rewards)
            for k in pass_at_k_of(n):
                found.setdefault(f"best@{k}/mean", {})[row] = best_of_k(rewards, k)
            if n > 1:
                majority = majority_reward([one.answer for one in group], rewards)
                found.setdefault(f"maj@{n}/mean", {})[row] = majority
    return found


def _changes(
    nested: Mapping[str, Mapping[int, float]], full: Mapping[str, Mapping[int, float]]
) -> dict[str, Estimate]:
    """Nested minus full, prompt by prompt: what they have in common cancels out."""
    found: dict[str, Estimate] = {}
    for name, column in nested.items():
        values, others = list(column.values()), [full[name][row] for row in column]
        differences = [value - other for value, other in zip(values, others, strict=True)]
        found[name] = Estimate(_mean(differences), *difference_interval(values, others))
    return found


def _parts(completions: Sequence[JudgedCompletion]) -> list[str]:
    """Every label of a set, sorted by name and value."""
    return sorted({label for one in completions for label in _labels(one)}, key=_natural)


def _labels(completion: JudgedCompletion) -> list[str]:
    return [f"{name}={value}" for name, value in completion.labels]


def _natural(text: str) -> tuple[str, int, str]:
    """level=10 comes after level=9."""
    name, _, value = text.partition("=")
    digits = "".join(c for c in value if c.isdecimal() and c.isascii())
    return name, int(digits or 0), value


def _num_samples(completions: Sequence[JudgedCompletion]) -> int:
    return 1 + max(one.sample for one in completions)


def _grouped(values: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """In the order in which the keys come."""
    found: dict[Key, list[Item]] = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
