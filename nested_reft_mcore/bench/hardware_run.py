"""`nested-reft bench hardware`: what a process of this machine can do, alone and with the others.

Every process runs this; the first one measures alone while the others wait, prints and writes.
The CUDA side has been read and type-checked, never run: there was no GPU to run it on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import psutil
import torch

from nested_reft_mcore.bench.hardware_profile import draft_profile
from nested_reft_mcore.bench.hardware_report import hardware_report
from nested_reft_mcore.bench.hardware_results import HardwareResults, Sharing
from nested_reft_mcore.bench.link_rates import LinkRate, make_circles, measure_circles
from nested_reft_mcore.bench.memory_rates import MemoryRate, matrix_vector, measure_memory
from nested_reft_mcore.bench.products import (
    ProductRate,
    measure_products,
    sizes_for,
    square_product,
)
from nested_reft_mcore.bench.timing import Measured, seconds_of
from nested_reft_mcore.config.bench_hardware import BenchHardwareOptions
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import barrier, gather_all
from nested_reft_mcore.observability.environment import environment_report

_SHARED_BYTES = 2**28
"""Read by each process while the others read theirs."""
_SHARED_SECONDS = 0.2
"""Of a round in which all work: long against the differences of their starts."""


def bench_hardware(options: BenchHardwareOptions, context: ParallelContext) -> None:
    """Measure, print and write, as `options` ask. UserError where a file cannot be written."""
    results = _measure(options, context)
    if context.is_main:
        draft = draft_profile(results)
        print(hardware_report(results, draft), flush=True)
        if options.json_file is not None:
            text = json.dumps(results.to_dict(), indent=2) + "\n"
            _write(Path(options.json_file), text)
        if options.output is not None:
            path = Path(options.output)
            # What cannot be loaded is not written.
            draft.profile(path.stem)
            _write(path, draft.to_yaml(path.stem))
            print(f"use it: nested-reft plan CONFIG --hardware {path}", flush=True)
    barrier()


def _measure(options: BenchHardwareOptions, context: ParallelContext) -> HardwareResults:
    rounds, device = options.num_rounds, context.device
    products: list[ProductRate] = []
    memory: list[MemoryRate] = []
    sizes = sizes_for(device, options.quick)
    if context.is_main:
        for name in options.dtype_names(device.type):
            _say(f"matrix products in {name}, one process", context)
            products += measure_products(sizes, getattr(torch, name), device, rounds)
        _say("memory, one process", context)
        memory += measure_memory(device, options.quick, rounds)
    barrier()
    sharing = None
    if context.local_world_size > 1:
        _say(f"{context.local_world_size} processes of a node at the same time", context)
        sharing = _measure_sharing(options, context)
    links: list[LinkRate] = []
    if context.world_size > 1:
        _say("all-reduces and messages", context)
        circles = make_circles(context)
        links = measure_circles(circles, context, options.quick, rounds)
    total = psutil.virtual_memory().total
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    environment = environment_report(context.world_size)
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        device_name, device_bytes = properties.name, properties.total_memory
    else:
        device_name = str(environment["cpu"]["model"])
        device_bytes = total // context.local_world_size
    return HardwareResults(
        device=kind,
        device_name=device_name,
        device_bytes=device_bytes,
        host_bytes=total,
        processes=context.world_size,
        nodes=-(-context.world_size // context.local_world_size),
        threads=torch.get_num_threads(),
        products=tuple(products),
        memory=tuple(memory),
        sharing=sharing,
        links=tuple(links),
        environment=environment,
        quick=options.quick,
    )


def _measure_sharing(options: BenchHardwareOptions, context: ParallelContext) -> Sharing:
    """Rounds alone and together take turns, so that a slow minute of the machine hits both."""
    side = sizes_for(context.device, options.quick).square
    dtype = torch.float32 if context.device.type == "cpu" else torch.bfloat16
    product, _ = square_product(side, dtype, context.device)
    read, _ = matrix_vector(_SHARED_BYTES >> (4 * options.quick), context.device)
    shares: list[Measured] = []
    for action in (product, read):
        once = gather_all(seconds_of(action, context.device, 1)[0], context)[0]
        calls = max(1, round(_SHARED_SECONDS / (4 if options.quick else 1) / once))
        ratios = []
        for _ in range(options.num_rounds):
            barrier()
            alone = 0.0
            if context.is_main:
                alone = seconds_of(action, context.device, 1, calls)[0]
            alone = gather_all(alone, context)[0]
            barrier()
            together = seconds_of(action, context.device, 1, calls)[0]
            # The node of the first process; others have others.
            every = gather_all(together, context)[: context.local_world_size]
            ratios.append(alone / max(every))
        shares.append(Measured.of(ratios))
    return Sharing(context.local_world_size, *shares)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    print(f"{path}: written", flush=True)


def _say(text: str, context: ParallelContext) -> None:
    if context.is_main:
        print(f"measuring: {text}", flush=True)
