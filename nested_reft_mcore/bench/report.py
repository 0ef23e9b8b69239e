"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.bench.results import PeerRow, Results, Row, WorkloadResult

_HEADINGS = ("skipped", "tokens/s", "(spread)", "speed-up", "ceiling", "ratio", "KV MiB", "waiting")


def print_results(results: Results) -> None:
    """Print one table for each workload."""
    machine, cpu = results.machine, results.environment["cpu"]
    print(
        f"\n{cpu['model']}, {cpu['count']} cores, {results.num_threads} threads; "
        f"{machine.peak_flops / 1e9:.0f} GFLOP/s, reads {machine.read_bandwidth / 1e9:.1f} GB/s; "
        f"decoding with {'native kernels' if results.native_kernels else 'torch'}"
    )
    for workload in results.workloads:
        print("\n" + "\n".join(describe_workload(workload)))
        if workload.context is None and results.decode_step is not None:
            step = results.decode_step
            print(
                f"decode step of {step.rows} rows: {step.seconds * 1e3:.2f} ms; reading the "
                f"weights takes {step.bound.weight_seconds * 1e3:.2f} ms, the arithmetic "
                f"{step.bound.arithmetic_seconds * 1e3:.2f} ms: {step.fraction:.0%} of the bound"
            )
    print(flush=True)


def write_results(results: Results, path: Path) -> None:
    """Write everything, every single run among it."""
    path.write_text(json.dumps(results.to_dict(), indent=2) + "\n", encoding="utf-8")


def describe_workload(result: WorkloadResult) -> list[str]:
    """The lines of one table."""
    lines = [_cells(row) for row in result.rows]
    table = align([_HEADINGS, *lines])
    useless = [row.key for row in result.rows if row.key.startswith("every") and row.speedup <= 1]
    if useless:
        table.append(
            f"skipping {' and '.join(useless)} made nothing faster, so ceilings and ratios mean "
            "nothing: the model is too small, or the machine is busy"
        )
    return [f"{result.name} (prompts x prompt tokens + new tokens)", *table] + [
        describe_peer(peer) for peer in result.peers
    ]


def describe_peer(peer: PeerRow) -> str:
    """One line for a peer: its speed and ours over it, or why there is none."""
    name = f"{peer.name} {peer.version}" if peer.version else peer.name
    if peer.tokens_per_second is None or peer.ours_over_theirs is None:
        return f"{name}: not measured: {peer.reason}"
    return (
        f"{name}: {peer.tokens_per_second:,.1f} tokens/s; full depth here is "
        f"{peer.ours_over_theirs:.2f}x as fast"
    )


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        aligned.append("  ".join(cells).rstrip())
    return aligned


def _cells(row: Row) -> tuple[str, ...]:
    share = ", ".join(f"{percentage:g}%" for percentage in row.percentages)
    name = row.key if row.part is None or not share else f"{row.key} ({share})"
    return (
        name,
        f"{row.tokens_per_second:,.1f}",
        f"({row.spread[0]:,.0f}-{row.spread[1]:,.0f})",
        f"{row.speedup:.2f}",
        "" if row.ceiling is None else f"{row.ceiling:.2f}",
        "" if row.ratio is None else f"{row.ratio:.3f}",
        " + ".join(f"{count / 2**20:.1f}" for count in row.kv_formula_bytes),
        " ".join(f"{share:.0%}" for share in row.waiting_shares),
    )
