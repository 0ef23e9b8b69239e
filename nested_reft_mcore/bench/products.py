"""Rates of matrix products: large square ones, the skinny ones of decoding, those of an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor

from nested_reft_mcore.bench.timing import Measured, own_clock, seconds_of
from nested_reft_mcore.mcore import native
from nested_reft_mcore.mcore.decode_native import NativeMath
from nested_reft_mcore.mcore.layer_weights import DecodeShape

Kind = Literal["square", "decode", "update"]
DECODE_ROWS = (1, 8, 16, 32, 64, 128)
"""Sequences of a pass; 1, 8, 64 and 128 and the doublings between them."""
_COLD_BYTES = 2**28
"""A decoding pass comes back to a layer's weights when it has read all others in between."""
_MOST_COPIES = 32


@dataclass(frozen=True)
class ProductRate:
    """Operations a second of one product."""

    kind: Kind
    dtype: str
    rows: int
    """Tokens."""
    depth: int
    """Width that goes in."""
    width: int
    """Width that comes out."""
    kernel: str
    """`torch`, or `native`: the kernels that decoding uses on this machine."""
    rate: Measured
    """Floating-point operations a second, two for each product and sum."""


@dataclass(frozen=True)
class ProductSizes:
    """What is measured on one kind of device."""

    square: int
    layers: tuple[tuple[int, int], ...]
    """Depth and width of matrices that models have."""
    update_rows: int
    decode_rows: tuple[int, ...] = DECODE_ROWS


QUICK = ProductSizes(256, ((64, 176),), 256, (1, 8, 64))
CPU = ProductSizes(2048, ((576, 1536), (1536, 8960)), 1024)
"""SmolLM2 135M, Qwen2.5 1.5B."""
CUDA = ProductSizes(8192, ((1536, 8960), (3584, 18944), (8192, 28672)), 8192)
"""Qwen2.5 1.5B, Qwen2.5 7B, Llama 3.1 70B."""


def sizes_for(device: torch.device, quick: bool) -> ProductSizes:
    """What a device is measured with."""
    if quick:
        return QUICK
    return CUDA if device.type == "cuda" else CPU


def measure_products(
    sizes: ProductSizes, dtype: torch.dtype, device: torch.device, num_rounds: int
) -> list[ProductRate]:
    """All products of one type of numbers, on this process alone."""
    side = sizes.square
    found = [_rate("square", (side, side, side), dtype, device, num_rounds)]
    for depth, width in sizes.layers:
        for rows in sizes.decode_rows:
            found.append(_rate("decode", (rows, depth, width), dtype, device, num_rounds))
        shape = (sizes.update_rows, depth, width)
        found.append(_rate("update", shape, dtype, device, num_rounds))
    return found


def square_product(
    side: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], float]:
    """A large product to call, and its operations."""
    return _torch_product((side, side, side), dtype, device), 2.0 * side**3


def _rate(
    kind: Kind,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    num_rounds: int,
) -> ProductRate:
    rows, depth, width = shape
    operations, kernel = 2.0 * rows * depth * width, "torch"
    if kind == "update":
        action, operations = _update_products(shape, dtype, device), 3 * operations
    elif kind == "decode" and _uses_native(dtype, device):
        action, kernel = _native_product(shape), "native"
    else:
        action = _torch_product(shape, dtype, device)
    seconds = Measured.of(seconds_of(action, device, num_rounds, clock=own_clock()))
    rate = seconds.per_second(operations)
    return ProductRate(kind, _name(dtype), rows, depth, width, kernel, rate)


def _torch_product(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    rows, depth, width = shape
    left = torch.randn(rows, depth, device=device).to(dtype)
    weights = cycle(_cold_copies(width, depth, dtype, device))
    product = torch.empty(rows, width, dtype=dtype, device=device)
    return lambda: torch.mm(left, next(weights).t(), out=product)


def _native_product(shape: tuple[int, int, int]) -> Callable[[], object]:
    rows, depth, width = shape
    device, dtype = torch.device("cpu"), torch.float32
    math = NativeMath(DecodeShape(depth, 1, 1, 8, 8, 1e-6), None)
    hidden, norm = torch.randn(rows, depth), torch.ones(depth)
    weights = cycle(_cold_copies(width, depth, dtype, device))
    return lambda: math.logits(hidden, norm, next(weights))


def _update_products(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Forward, gradient of the input, gradient of the weights."""
    rows, depth, width = shape
    inputs = torch.randn(rows, depth, device=device).to(dtype)
    weight = torch.randn(width, depth, device=device).to(dtype)
    gradient = torch.randn(rows, width, device=device).to(dtype)

    def once() -> None:
        torch.mm(inputs, weight.t())
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), inputs)

    return once


def _cold_copies(width: int, depth: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The matrix so often that the first has left the caches when the last has been read."""
    count = max(1, min(_MOST_COPIES, _COLD_BYTES // (width * depth * dtype.itemsize)))
    return [torch.randn(width, depth, device=device).to(dtype) for _ in range(count)]


def _uses_native(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and native.problem() is None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
