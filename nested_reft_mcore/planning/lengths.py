"""How long prompts and responses are: a law, cut at the limit, with a stated mean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.config.errors import UserError

LawKind = Literal["lognormal", "exponential", "fixed", "observed"]
NAMED_LAWS = tuple(kind for kind in get_args(LawKind) if kind != "observed")
_NORMAL = NormalDist()
_LARGEST_FILL = 0.98
"""Share of the limit beyond which no long-tailed law has such a mean."""


@dataclass(frozen=True)
class LengthLaw:
    """Tokens of a prompt or response; what is longer than `limit` is cut there.

    `mean` is that of the cut lengths, so laws of one mean ask for equally many tokens.
    """

    kind: LawKind
    mean: float
    limit: int
    spread: float = 0.7
    """Standard deviation of the logarithm, before the cut (`lognormal`)."""
    correlation: float = 0.0
    """Share of the logarithm's variance that samples of one prompt have in common."""
    observed: tuple[int, ...] = ()
    """Lengths to draw from, with replacement (`observed`)."""

    def draw(
        self, rng: np.random.Generator, num_prompts: int, num_samples: int
    ) -> NDArray[np.int64]:
        """Lengths of `[num_prompts, num_samples]`, each between 1 and `limit`."""
        size = (num_prompts, num_samples)
        if self.kind == "observed":
            found = rng.choice(np.asarray(self.observed), size)
        elif self.kind == "fixed" or self.mean > _LARGEST_FILL * self.limit:
            found = np.full(size, self.mean)
        elif self.kind == "exponential":
            found = rng.exponential(self._scale(), size)
        else:
            common = rng.standard_normal((num_prompts, 1)) * math.sqrt(self.correlation)
            own = rng.standard_normal(size) * math.sqrt(1 - self.correlation)
            found = self._scale() * np.exp(self.spread * (common + own))
        return self._cut(found)

    def quantiles(self, count: int) -> NDArray[np.int64]:
        """So many lengths that stand for the law: those of evenly spread shares, ascending."""
        shares = (np.arange(count) + 0.5) / count
        if self.kind == "observed":
            return self._cut(np.quantile(np.asarray(self.observed, dtype=np.float64), shares))
        if self.kind == "fixed" or self.mean > _LARGEST_FILL * self.limit:
            return self._cut(np.full(count, self.mean))
        if self.kind == "exponential":
            return self._cut(-self._scale() * np.log1p(-shares))
        normal = np.asarray([_NORMAL.inv_cdf(share) for share in shares.tolist()])
        return self._cut(self._scale() * np.exp(self.spread * normal))

    def _cut(self, lengths: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(np.rint(lengths), 1, self.limit).astype(np.int64)

    def _scale(self) -> float:
        """The uncut law's mean (`exponential`) or median (`lognormal`), by bisection."""
        low, high = 1e-6 * self.mean, 1e6 * self.limit
        for _ in range(200):
            middle = math.sqrt(low * high)
            if self._cut_mean(middle) < self.mean:
                low = middle
            else:
                high = middle
        return high

    def _cut_mean(self, scale: float) -> float:
        """Mean of min(X, limit)."""
        if self.kind == "exponential":
            return scale * -math.expm1(-self.limit / scale)
        spread = max(self.spread, 1e-9)
        place = math.log(self.limit / scale) / spread
        below = scale * math.exp(spread**2 / 2) * _NORMAL.cdf(place - spread)
        return below + self.limit * (1 - _NORMAL.cdf(place))


def length_law(name: str, mean: float, limit: int, spread: float, correlation: float) -> LengthLaw:
    """A named law, or the lengths that a file holds.

    Args:
        name: `lognormal`, `exponential`, `fixed`, or a file: a whole number a line, or a run's
            `rollouts/*.jsonl`.
        mean: Of the cut lengths, in tokens; a file has its own.
        limit: Longest length in tokens.
        spread: As of `LengthLaw`.
        correlation: As of `LengthLaw`.

    Raises:
        UserError: a value that cannot be, no such file, or a line that is no length.
    """
    if not 0 <= spread < math.inf:
        raise UserError(f"--length-spread {spread:g}: expected 0 or more")
    if not 0 <= correlation <= 1:
        raise UserError(f"--length-correlation {correlation:g}: expected 0 to 1")
    if name in NAMED_LAWS:
        return LengthLaw(cast(LawKind, name), mean, limit, spread, correlation)
    observed = read_lengths(Path(name))
    cut = np.minimum(observed, limit)
    return LengthLaw("observed", float(cut.mean()), limit, observed=tuple(observed))


def read_lengths(path: Path) -> Sequence[int]:
    """The lengths that a file holds. UserError as of `length_law`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"--lengths {path}: no such file; expected a file, or {', '.join(NAMED_LAWS)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lengths {path}: cannot be read: {error}") from None
    found = [
        _length_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise UserError(f"--lengths {path}: is empty; expected a whole number a line")
    return found


def _length_of(line: str, place: str) -> int:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict) and isinstance(value.get("token_ids"), list):
        value = len(value["token_ids"])
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"{place}: {line.strip()[:40]!r} is no length; expected a whole number above 0, or a "
            "line of a run's rollouts (`token_ids`)"
        )
    return value
