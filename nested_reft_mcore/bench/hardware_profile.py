"""From measurements to the profile that `plan` and `simulate` read.

Every line says whether it was measured. What was not keeps the value of a built-in profile, or the
default of an assumption, and the line says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nested_reft_mcore.bench.hardware_results import HardwareResults
from nested_reft_mcore.bench.link_rates import LinkRate, Place
from nested_reft_mcore.bench.products import ProductRate
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.planning.hardware import (
    BUILT_IN,
    DEFAULT_HARDWARE,
    Assumptions,
    HardwareProfile,
)
from nested_reft_mcore.planning.hardware_file import profile_yaml

_CPU_RESERVE_GB = 1.0
"""What a process has in memory before there is a model: Python, torch, Megatron."""
_GIGA, _TERA = 1e9, 1e12
_DEFAULT = "default, not measured"


@dataclass(frozen=True)
class Entry:
    """One line of a profile."""

    key: str
    value: Any
    note: str
    is_measured: bool = True


@dataclass(frozen=True)
class ProfileDraft:
    """A profile with a note for every line."""

    fields: tuple[Entry, ...]
    assumptions: tuple[Entry, ...]

    def profile(self, name: str) -> HardwareProfile:
        """As `planning.hardware` knows it. UserError where a value cannot be."""
        data: dict[str, Any] = {entry.key: entry.value for entry in self.fields}
        data["assumptions"] = {entry.key: entry.value for entry in self.assumptions}
        return section_from_dict(HardwareProfile, {"name": name, **data}, "bench hardware")

    def to_yaml(self, name: str) -> str:
        """The file that `--hardware` reads."""
        remarks = {entry.key: entry.note for entry in (*self.fields, *self.assumptions)}
        heading = "Written by `nested-reft bench hardware`; for `plan` and `simulate --hardware`."
        return profile_yaml(self.profile(name), remarks, heading)

    @property
    def guesses(self) -> list[Entry]:
        """Fields that were not measured."""
        return [entry for entry in self.fields if not entry.is_measured]

    @property
    def defaults(self) -> list[Entry]:
        """Assumptions that no rate of the machine tells."""
        return [entry for entry in self.assumptions if not entry.is_measured]


def draft_profile(results: HardwareResults) -> ProfileDraft:
    """The profile of what was measured, and of what the built-in one nearest to it says."""
    base = BUILT_IN[nearest_built_in(results.device_name)]
    fields = [*_compute(results, base), *_bandwidths(results, base), *_machine(results)]
    kept = [entry.key for entry in fields if f"value of {base.name}" in entry.note]
    fields.append(Entry("source", _source(results, base, kept), ""))
    return ProfileDraft(tuple(fields), _assumptions(results))


def nearest_built_in(device_name: str) -> str:
    """The built-in profile that a device's name speaks of, else the default one."""
    lowered = device_name.lower()
    return next((n for n in BUILT_IN if n.split("-")[0] in lowered), DEFAULT_HARDWARE)


def main_dtype(results: HardwareResults) -> str:
    """The type of numbers that models have on such a device, as far as it was measured."""
    wanted = "bfloat16" if results.device == "cuda" else "float32"
    known = {product.dtype for product in results.products}
    return wanted if wanted in known else next(iter(sorted(known)))


def row_shares(results: HardwareResults) -> tuple[tuple[float, float], ...]:
    """Rows of a decoding product and its share of the peak: the median over matrices.

    A product of more rows never takes less time, whatever noise says: shares that would have it so
    are lowered.
    """
    dtype = main_dtype(results)
    peak = _peak(results, dtype)
    assert peak is not None
    by_rows: dict[int, list[float]] = {}
    for product in results.products_of("decode", dtype):
        by_rows.setdefault(product.rows, []).append(product.rate.median / peak)
    shares: list[tuple[float, float]] = []
    least_time = 0.0
    for rows in sorted(by_rows):
        least_time = max(least_time, rows / statistics.median(by_rows[rows]))
        shares.append((rows, _short(rows / least_time)))
    return tuple(shares)


def _compute(results: HardwareResults, base: HardwareProfile) -> list[Entry]:
    entries = []
    for key, dtype in (("peak_tflops", "bfloat16"), ("peak_tflops_float32", "float32")):
        peak = _peak(results, dtype)
        other = _peak(results, "float32")
        if peak is None and results.device == "cpu" and other is not None:
            note = f"NOT MEASURED ({dtype} was left out): that of float32"
            entries.append(Entry(key, _short(other / _TERA), note, is_measured=False))
        elif peak is None:
            entries.append(_kept(key, base, f"{dtype} was left out"))
        else:
            note = f"{dtype}, the fastest product"
            entries.append(Entry(key, _short(peak / _TERA), note))
    sharing = results.sharing
    if sharing is not None:
        for key, value in (("compute", sharing.compute), ("memory", sharing.memory)):
            note = f"{value.low:.2f} to {value.high:.2f} in {sharing.processes} processes"
            entries.append(Entry(f"busy_{key}_share", _short(min(1.0, value.median)), note))
        entries.append(Entry("busy_processes", sharing.processes, "at work together"))
    kernels = {p.kernel for p in results.products_of("decode", main_dtype(results))}
    shares = [list(pair) for pair in row_shares(results)]
    note = f"rows, share of the peak of {main_dtype(results)}; {', '.join(sorted(kernels))} kernels"
    return [*entries, Entry("product_shares", shares, note)]


def _bandwidths(results: HardwareResults, base: HardwareProfile) -> list[Entry]:
    best = max(results.memory, key=lambda memory: memory.rate.median)
    if results.device == "cuda":
        # A host's memory is no device's.
        best = max(
            (m for m in results.memory if m.what != "from the host"), key=lambda m: m.rate.median
        )
    entries = [Entry("memory_gb_per_s", _short(best.rate.median / _GIGA), best.what)]
    places: tuple[tuple[str, Place, str], ...] = (
        ("node_link_gb_per_s", "node", "one process on the node"),
        ("network_gb_per_s", "network", "one node"),
    )
    for key, place, why in places:
        links = results.links_of(place, "message")
        if links:
            rate = max(link.rate.median for link in links)
            entries.append(Entry(key, _short(rate / _GIGA), "the largest messages"))
        else:
            entries.append(_kept(key, base, why))
    host = [memory for memory in results.memory if memory.what == "from the host"]
    if not host:
        host = [memory for memory in results.memory if memory.what == "copy"]
    note = "copy of memory" if host[0].what == "copy" else "from pinned memory"
    return [*entries, Entry("host_link_gb_per_s", _short(host[0].rate.median / _GIGA), note)]


def _machine(results: HardwareResults) -> list[Entry]:
    of_device = "the device" if results.device == "cuda" else "a process's share of the machine"
    kernels = "fused" if results.device == "cuda" else "cpu"
    return [
        Entry("memory_gb", _short(results.device_bytes / _GIGA), of_device),
        Entry("host_memory_gb", _short(results.host_bytes / _GIGA), "of a node"),
        Entry("kernels", kernels, "how norms and SwiGLU are computed"),
    ]


def _source(results: HardwareResults, base: HardwareProfile, kept: Sequence[str]) -> str:
    """Goes with the profile wherever it is written again, so it has what must not be forgotten."""
    text = (
        f"bench hardware on {results.device_name}, {results.processes} processes of "
        f"{results.threads} threads, {results.environment.get('time', '')}"
    )
    if results.quick:
        text += "; --quick, at sizes that measure little"
    return f"{text}; not measured, of {base.name}: {', '.join(kept)}" if kept else text


def _assumptions(results: HardwareResults) -> tuple[Entry, ...]:
    defaults = Assumptions()
    found: dict[str, tuple[float, str]] = {}
    dtype = main_dtype(results)
    peak = _peak(results, dtype)
    assert peak is not None
    updates = results.products_of("update", dtype)
    share = statistics.median(product.rate.median for product in updates) / peak
    found["matmul_efficiency"] = (min(1.0, share), "products of an update, forward and backward")
    read = next(m for m in results.memory if m.what == "matrix times vector")
    best = max(m.rate.median for m in results.memory if m.what != "from the host")
    found["decode_efficiency"] = (read.rate.median / best, "a matrix times a vector")
    if results.device == "cpu":
        found["reserve_gb"] = (_CPU_RESERVE_GB, "a process before there is a model; not measured")
    found |= _link_assumptions(results)
    entries = []
    for name in Assumptions.model_fields:
        if name in found:
            value, note = found[name]
            is_measured = name != "reserve_gb"
            entries.append(Entry(name, _short(value), note, is_measured))
        else:
            entries.append(Entry(name, getattr(defaults, name), _DEFAULT, is_measured=False))
    return tuple(entries)


def _link_assumptions(results: HardwareResults) -> dict[str, tuple[float, str]]:
    found: dict[str, tuple[float, str]] = {}
    reduces = results.links_of("node", "all-reduce") or results.links_of("network", "all-reduce")
    messages = results.links_of("node", "message") or results.links_of("network", "message")
    if not reduces or not messages:
        return found
    found["all_reduce_latency_us"] = (reduces[0].seconds.median * 1e6, _size(reduces[0]))
    found["message_latency_us"] = (messages[0].seconds.median * 1e6, _size(messages[0]))
    share = _best(reduces) / _best(messages)
    note = "rate of the largest all-reduces over that of messages"
    found["link_efficiency"] = (min(1.0, share), note)
    return found


def _best(links: Sequence[LinkRate]) -> float:
    return max(link.rate.median for link in links)


def _size(link: LinkRate) -> str:
    return f"{link.what} of {link.num_bytes} bytes"


def _peak(results: HardwareResults, dtype: str) -> float | None:
    """The best rate of any product: a small one may beat the large square one."""
    found: list[ProductRate] = [p for p in results.products if p.dtype == dtype]
    return max((product.rate.median for product in found), default=None)


def _kept(key: str, base: HardwareProfile, why: str) -> Entry:
    note = f"NOT MEASURED ({why}): the built-in value of {base.name}"
    return Entry(key, getattr(base, key), note, is_measured=False)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
