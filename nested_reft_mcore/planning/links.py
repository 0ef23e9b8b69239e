"""Bytes a second that groups of ranks have between them."""

from __future__ import annotations

from nested_reft_mcore.planning.hardware import HardwareProfile
from nested_reft_mcore.planning.layout import Layout


def ring_share(size: int) -> float:
    """What each rank sends in a ring all-reduce, in units of the tensor: 2 (n - 1) / n.

    Reduce-scatter and all-gather send half of it each.
    """
    return 2 * (size - 1) / size


def tensor_link(layout: Layout, hardware: HardwareProfile) -> float:
    """Between tensor-parallel ranks."""
    return _speed(layout.tensor_is_local, hardware)


def data_link(layout: Layout, hardware: HardwareProfile) -> float:
    """Between replicas."""
    return _speed(layout.data_is_local, hardware)


def pipeline_link(layout: Layout, hardware: HardwareProfile) -> float:
    """Between neighbouring stages."""
    return _speed(layout.pipeline_is_local, hardware)


def _speed(is_local: bool, hardware: HardwareProfile) -> float:
    peak = hardware.node_link_gb_per_s if is_local else hardware.network_gb_per_s
    return peak * 1e9 * hardware.assumptions.link_efficiency
