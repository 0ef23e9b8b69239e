"""How fast matrix products of decoding are, by the number of rows that share the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layer_costs import FLOAT32


def peak_operations(hardware: HardwareProfile, itemsize: int) -> float:
    """Operations a second of large products in this type of numbers."""
    peak = hardware.peak_tflops_float32 if itemsize == FLOAT32 else hardware.peak_tflops
    return peak * 1e12


class DecodeProducts:
    """Seconds of the products of a pass: `plan` takes them where reading weights takes less.

    With `product_shares` the time of a product is linear in its rows between the measured ones,
    and never falls. Without them all products run at the rate of an update's.
    """

    def __init__(self, hardware: HardwareProfile, itemsize: int) -> None:
        assumed = hardware.assumptions
        speed = peak_operations(hardware, itemsize)
        shares = hardware.product_shares
        if not shares:
            self._rows, self._times = np.zeros(0), np.zeros(0)
            self._speed = speed * assumed.matmul_efficiency
            return
        self._speed = speed * assumed.decode_matmul_efficiency
        self._rows = np.asarray([rows for rows, _ in shares], dtype=np.float64)
        each = self._rows / np.asarray([share for _, share in shares])
        self._times = np.maximum.accumulate(each)
        """In units of one row at the peak."""

    def seconds(self, operations: Any, rows: Any) -> Any:
        """Of so many operations, which `rows` tokens share evenly; numbers or arrays."""
        if not len(self._rows):
            return operations / self._speed
        rows = np.asarray(rows, dtype=np.float64)
        taken = np.interp(rows, self._rows, self._times)
        # Beyond what was measured each row takes what it did there.
        beyond = np.maximum(1.0, rows / self._rows[-1])
        per_row = taken * beyond / np.maximum(rows, 1e-12)
        return np.where(rows > 0, operations * per_row / self._speed, 0.0)
