"""How fast memory is read and copied, and what goes between host and device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nested_reft_mcore.bench.timing import Measured, own_clock, seconds_of

_FULL_BYTES, _QUICK_BYTES = 2**29, 2**24


@dataclass(frozen=True)
class MemoryRate:
    """Bytes a second of one way to use memory."""

    what: str
    num_bytes: int
    """Read and written by a call."""
    rate: Measured


def measure_memory(device: torch.device, quick: bool, num_rounds: int) -> list[MemoryRate]:
    """A matrix times a vector, which reads the matrix; a copy, which reads and writes.

    On a GPU also a copy from pinned host memory.
    """
    size = _QUICK_BYTES if quick else _FULL_BYTES
    product, read = matrix_vector(size, device)
    found = [_rate("matrix times vector", product, read, device, num_rounds)]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size
    found.append(_rate("copy", lambda: target.copy_(source), copied, device, num_rounds))
    if device.type == "cuda":
        host = torch.empty(size // 4, pin_memory=True)

        def arrive() -> None:
            target.copy_(host, non_blocking=True)

        found.append(_rate("from the host", arrive, size, device, num_rounds))
    return found


def matrix_vector(size: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """A product to call that reads about `size` bytes once, and how many exactly."""
    side = int((size // 4) ** 0.5)
    matrix = torch.ones(side, side, device=device)
    vector, result = torch.ones(side, device=device), torch.empty(side, device=device)
    return lambda: torch.mv(matrix, vector, out=result), 4 * side * side


def _rate(
    what: str,
    action: Callable[[], object],
    num_bytes: int,
    device: torch.device,
    num_rounds: int,
) -> MemoryRate:
    seconds = Measured.of(seconds_of(action, device, num_rounds, clock=own_clock()))
    return MemoryRate(what, num_bytes, seconds.per_second(num_bytes))
