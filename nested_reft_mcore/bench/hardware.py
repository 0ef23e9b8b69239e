"""What the machine can do at best, measured beside everything else: products and reading memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nested_reft_mcore.bench.products import square_product
from nested_reft_mcore.bench.timing import seconds_of

_PRODUCT_SIZE = 2048
_READ_BYTES = 2**28
_TRIALS = 5


@dataclass(frozen=True)
class Machine:
    """Best rates of one process."""

    peak_flops: float
    """Floating-point operations a second of a large square matrix product."""
    read_bandwidth: float
    """Bytes a second at which a large tensor is read."""


@dataclass(frozen=True)
class StepBound:
    """Why one decode step of all rows cannot take less."""

    weight_seconds: float
    """Reading every weight of the products once."""
    arithmetic_seconds: float
    """Doing the products at the peak rate."""

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.weight_seconds, self.arithmetic_seconds)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Both rates with this process's threads: the best of a few trials."""
    multiply, operations = square_product(_PRODUCT_SIZE, dtype, device)
    # Larger than most caches; integers, so that nothing but reading takes time.
    memory = torch.ones(_READ_BYTES // 8, dtype=torch.int64, device=device)
    return Machine(
        peak_flops=operations / min(seconds_of(multiply, device, _TRIALS, 1)),
        read_bandwidth=_READ_BYTES / min(seconds_of(memory.sum, device, _TRIALS, 1)),
    )


def step_bound(num_weights: int, weight_bytes: int, num_rows: int, machine: Machine) -> StepBound:
    """The bound of one decode step: `num_weights` numbers of matrices that `num_rows` rows meet."""
    return StepBound(
        weight_seconds=weight_bytes / machine.read_bandwidth,
        arithmetic_seconds=2 * num_weights * num_rows / machine.peak_flops,
    )
