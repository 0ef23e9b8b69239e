"""The table of a preflight that found nothing wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nested_reft_mcore.launch.links import Link, slowest
from nested_reft_mcore.launch.preflight import Needs, Report, format_bytes


def preflight_table(
    needs: Needs, reports: Sequence[Report], links: Sequence[Link], seconds: float
) -> str:
    """What was checked, in a few lines."""
    hosts = {report.host for report in reports}
    versions = reports[0].versions
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "megatron-core"))
    devices = Counter(report.device or "CPU" for report in reports)
    free = min(report.free_bytes for report in reports if report.free_bytes)
    size = format_bytes(needs.checkpoint_bytes)
    rows = [
        ("versions", f"{shown}, code {versions['nested_reft_mcore']}; the same everywhere"),
        ("devices", ", ".join(f"{count} x {name}" for name, count in devices.items())),
        ("read", f"{max(report.num_files for report in reports)} files, on every node"),
        ("write", f"{needs.run_dir}, on every node"),
        ("disk", f"{format_bytes(free)} free; a checkpoint takes {size}"),
    ]
    for name, (reduce, send) in slowest(links).items():
        rows.append(
            (
                f"{name} x {reduce.size}",
                f"all-reduce {reduce.all_reduce:.2f} GB/s, messages {send.send:.2f} GB/s; slowest "
                f"at rank {reduce.rank} on {reduce.host} and rank {send.rank} on {send.host}",
            )
        )
    head = f"preflight: {len(reports)} processes on {len(hosts)} nodes are fit ({seconds:.1f} s)"
    if len(reports) == 1:
        head = f"preflight: {reports[0].host} is fit ({seconds:.1f} s)"
    return "\n".join([head, *(f"  {name:<13} {text}" for name, text in rows)])
