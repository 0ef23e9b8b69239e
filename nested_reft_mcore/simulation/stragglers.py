"""Who is slow: factors on the time of every pass, for each replica and stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nested_reft_mcore.config.errors import UserError


@dataclass(frozen=True)
class Slow:
    """One replica's stage that takes `factor` times as long, or all stages of a replica."""

    replica: int
    stage: int | None
    factor: float


@dataclass(frozen=True)
class Stragglers:
    """GPUs that take longer than others at the same work."""

    share: float = 0.0
    """Of all GPUs, drawn once: what is slow stays slow."""
    factor: float = 1.0
    """How much longer each of these takes."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of every GPU's factor beside that."""
    named: tuple[Slow, ...] = ()

    def check(self) -> None:
        """Raises UserError: a value that cannot be."""
        for name, value, is_good, wanted in (
            ("--slow-share", self.share, 0 <= self.share <= 1, "0 to 1"),
            ("--slow-factor", self.factor, self.factor >= 1, "1 or more"),
            ("--jitter", self.jitter, self.jitter >= 0, "0 or more"),
        ):
            if not is_good:
                raise UserError(f"{name} {value:g}: expected {wanted}")

    def draw(
        self, rng: np.random.Generator, replicas: int, stages: int, tensor: int
    ) -> NDArray[np.float64]:
        """Factors of `[replicas, stages]`: tensor-parallel ranks wait for their slowest.

        Raises UserError where a named replica or stage is not there.
        """
        size = (replicas, stages, tensor)
        gpus = np.where(rng.random(size) < self.share, self.factor, 1.0)
        # Nobody is faster than the machine's profile says.
        gpus = gpus * np.exp(self.jitter * np.abs(rng.standard_normal(size)))
        factors = gpus.max(axis=2)
        for slow in self.named:
            if slow.replica >= replicas or (slow.stage is not None and slow.stage >= stages):
                raise UserError(
                    f"--slow: there is no stage {slow.stage if slow.stage is not None else '*'} of "
                    f"replica {slow.replica}; there are replicas 0 to {replicas - 1} of "
                    f"{stages} stages"
                )
            where = slice(None) if slow.stage is None else slow.stage
            factors[slow.replica, where] *= slow.factor
        return factors


def parse_slow(texts: Sequence[str]) -> tuple[Slow, ...]:
    """`REPLICA=FACTOR` or `REPLICA:STAGE=FACTOR` each. UserError for anything else."""
    found = []
    for text in texts:
        match = re.fullmatch(r"(\d+)(?::(\d+))?=(\d+(?:\.\d+)?)", text.strip())
        if match is None or float(match[3]) < 1:
            raise UserError(
                f"--slow {text}: expected REPLICA=FACTOR or REPLICA:STAGE=FACTOR with a factor of "
                "1 or more, as in 3:0=1.5"
            )
        stage = None if match[2] is None else int(match[2])
        found.append(Slow(int(match[1]), stage, float(match[3])))
    return tuple(found)
