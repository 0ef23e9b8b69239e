"""How the KL of several skipped parts follows from what each of them costs alone.

Parts cost more together than their sum: each one's error is the next one's input. A plan's KL is
predicted as `scale * total ** exponent`, `total` being the sum of the parts' own KL divergences in
nats per token. It is a fit, not a law of nature: whoever uses it measures other combinations of the
same pool and says how far off it is. Being monotone, it turns a budget of KL into a budget of the
sum, which is what makes choosing parts a knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SMALLEST_KL = 1e-9
"""Nats per token; less is rounding."""
_EXPONENTS = (0.5, 3.0)
"""Where a fit of noisy measurements may end."""


@dataclass(frozen=True)
class KlInteraction:
    """predicted KL = scale * (sum of the parts' own KL) ** exponent, in nats per token.

    Raises ValueError unless both are positive and finite.
    """

    scale: float = 1.0
    exponent: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "exponent"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, found {value}")

    def predict(self, total: float) -> float:
        """KL in nats per token of a plan whose parts cost `total` one by one."""
        return self.scale * max(total, 0.0) ** self.exponent

    def total_within(self, budget: float) -> float:
        """The largest sum whose predicted KL is at most `budget` nats per token."""
        return (budget / self.scale) ** (1.0 / self.exponent)


@dataclass(frozen=True)
class InteractionFit:
    """An interaction with how well it describes what it was fitted to."""

    interaction: KlInteraction
    spread: float
    """Standard deviation of log(measured / predicted), with the fit's degrees of freedom."""


def fit_interaction(totals: Sequence[float], measured: Sequence[float]) -> InteractionFit:
    """Least squares of log(measured KL) on log(sum), in nats per token, one pair for each plan.

    Where the sums hardly differ the exponent cannot be told, and is 1. Raises ValueError for
    sequences that are empty or of different lengths.
    """
    if not totals or len(totals) != len(measured):
        raise ValueError(f"need as many sums as measurements, got {len(totals)} / {len(measured)}")
    x = [math.log(max(total, _SMALLEST_KL)) for total in totals]
    y = [math.log(max(kl, _SMALLEST_KL)) for kl in measured]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    variance = sum((value - mean_x) ** 2 for value in x)
    exponent = 1.0
    if variance > 1e-2:
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / variance
        exponent = min(max(slope, _EXPONENTS[0]), _EXPONENTS[1])
    scale = math.exp(mean_y - exponent * mean_x)
    residuals = [b - mean_y - exponent * (a - mean_x) for a, b in zip(x, y, strict=True)]
    freedom = max(1, len(x) - 2)
    spread = math.sqrt(sum(residual**2 for residual in residuals) / freedom)
    return InteractionFit(KlInteraction(scale, exponent), spread)


@dataclass(frozen=True)
class Recommendation:
    """How to skip one part of k random layers within a budget of KL."""

    border_layers: int
    """Sensitive layers at either end, the shorter run of both: one number serves for both ends."""
    protected: tuple[int, ...]
    """Further sensitive layers."""
    num_skipped: int
    """The largest k whose expected KL stays within the budget; 0 where none does."""
    predicted_kl: float
    """Nats per token of k random ones of the layers that are left; 0 for k = 0."""


def recommend(
    layer_kls: Sequence[float], interaction: KlInteraction, kl_budget: float
) -> Recommendation:
    """What the laws `uniform` and `stage_balanced` should leave alone, and how many layers to skip.

    A layer is sensitive if skipping it alone costs more than the budget, or more than three times
    the median layer: drawn now and then, it would cost most of the KL for a share of the time.

    Args:
        layer_kls: Nats per token of skipping each layer's part alone, in layer order.
        interaction: Of several at once.
        kl_budget: Nats per token.
    """
    num_layers = len(layer_kls)
    median = sorted(layer_kls)[(num_layers - 1) // 2]
    limit = min(kl_budget, 3.0 * median) if median > 0 else kl_budget
    sensitive = [kl > limit for kl in layer_kls]
    front = next((i for i, is_bad in enumerate(sensitive) if not is_bad), num_layers)
    back = next((i for i, is_bad in enumerate(reversed(sensitive)) if not is_bad), num_layers)
    border = min(front, back, num_layers // 2)
    inner = range(border, num_layers - border)
    free = [layer_kls[layer] for layer in inner if not sensitive[layer]]
    mean = sum(free) / len(free) if free else 0.0
    fitting = [k for k in range(1, len(free) + 1) if interaction.predict(k * mean) <= kl_budget]
    best = max(fitting, default=0)
    return Recommendation(
        border_layers=border,
        protected=tuple(layer for layer in inner if sensitive[layer]),
        num_skipped=best,
        predicted_kl=interaction.predict(best * mean) if best else 0.0,
    )
