"""Tables of what `nested-reft bench hardware` has measured."""

from __future__ import annotations

from collections.abc import Sequence

from nested_reft_mcore.bench.hardware_profile import ProfileDraft
from nested_reft_mcore.bench.hardware_results import HardwareResults
from nested_reft_mcore.bench.report import align
from nested_reft_mcore.bench.timing import Measured


def hardware_report(results: HardwareResults, draft: ProfileDraft) -> str:
    """All tables, then what was not measured."""
    sections = [
        [
            f"{results.device_name}: {results.processes} processes on {results.nodes} node(s), "
            f"{results.threads} threads each; medians, and the spread of rounds in brackets"
        ],
        _products(results),
        _memory(results),
        _sharing(results),
        _links(results),
        _guesses(draft),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _products(results: HardwareResults) -> list[str]:
    rows: list[Sequence[str]] = [("matrix products", "rows", "matrix", "kernel", "GFLOP/s", "")]
    for product in results.products:
        rows.append(
            (
                f"{product.dtype} {product.kind}",
                str(product.rows),
                f"{product.depth} x {product.width}",
                product.kernel,
                *_cells(product.rate, 1e9),
            )
        )
    return align(rows)


def _memory(results: HardwareResults) -> list[str]:
    rows: list[Sequence[str]] = [("memory", "MiB", "GB/s", "")]
    for memory in results.memory:
        size = f"{memory.num_bytes / 2**20:,.0f}"
        rows.append((memory.what, size, *_cells(memory.rate, 1e9)))
    return align(rows)


def _sharing(results: HardwareResults) -> list[str]:
    sharing = results.sharing
    if sharing is None:
        return ["one process on the node: what processes take from each other is not measured"]
    rows = [
        (f"of its rate alone, {sharing.processes} processes at work", "share", ""),
        ("matrix product", *_cells(sharing.compute, 1.0)),
        ("matrix times vector", *_cells(sharing.memory, 1.0)),
    ]
    return align(rows)


def _links(results: HardwareResults) -> list[str]:
    if not results.links:
        return []
    rows: list[Sequence[str]] = [("links", "where", "processes", "bytes", "µs", "", "GB/s")]
    for link in results.links:
        rows.append(
            (
                link.what,
                link.place,
                str(link.processes),
                f"{link.num_bytes:,}",
                *_cells(link.seconds, 1e-6),
                f"{link.rate.median / 1e9:.3g}",
            )
        )
    return align(rows)


def _guesses(draft: ProfileDraft) -> list[str]:
    defaults = ", ".join(f"{entry.key} {entry.value:g}" for entry in draft.defaults)
    return [
        *(f"{entry.key} {entry.value:g}: {entry.note}" for entry in draft.guesses),
        "no rate of a machine tells these, which keep their defaults (tools/calibrate_plan.py fits "
        f"some of them to runs): {defaults}",
    ]


def _cells(value: Measured, unit: float) -> tuple[str, str]:
    low, high = value.low / unit, value.high / unit
    return f"{value.median / unit:.3g}", f"({low:.3g}-{high:.3g})"
