"""A step as a Chrome trace: open it in chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_reft_mcore.config.errors import UserError, reason_of
from nested_reft_mcore.simulation.decode_timing import Item, record_passes
from nested_reft_mcore.simulation.simulate import Simulation
from nested_reft_mcore.simulation.step import Phase, StepResult

Event = dict[str, Any]
_MICROSECONDS = 1e6


def trace_events(simulation: Simulation, walked: int | None = 2) -> list[Event]:
    """The first step of the first replica, of the fastest to generate and of the slowest.

    A process of the trace is a replica, a thread one of its stages; times are microseconds. Of
    each stretch of rounds in which nobody ends `walked` are shown pass by pass, the others as one.
    """
    step = simulation.steps[0]
    ends = step.summed("waits_outside", "generation").min(axis=1)
    replicas = sorted({0, int(ends.argmin()), int(ends.argmax())})
    events = list(_names(simulation, replicas))
    for phase in step.phases:
        events.append(_event(phase.name, phase.start, phase.seconds, -1, 0, {}))
    for replica in replicas:
        events += _of_replica(step, replica, walked)
    return events


def write_trace(simulation: Simulation, path: Path) -> int:
    """Write a trace file; returns the number of events. UserError where it cannot be written."""
    events = trace_events(simulation)
    record = {"traceEvents": events, "displayTimeUnit": "ms"}
    try:
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--trace {path}: cannot be written: {reason_of(error)}") from None
    return len(events)


def _names(simulation: Simulation, replicas: Sequence[int]) -> Iterator[Event]:
    yield _name("process_name", -1, 0, "all replicas")
    for replica in replicas:
        yield _name("process_name", replica, 0, f"replica {replica}")
        for stage in range(simulation.run.layout.pipeline):
            factor = simulation.factors[replica, stage]
            slow = f" (x {factor:.2f})" if factor > 1 else ""
            yield _name("thread_name", replica, stage, f"stage {stage}{slow}")


def _name(kind: str, replica: int, stage: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": replica, "tid": stage, "args": {"name": name}}


def _of_replica(step: StepResult, replica: int, walked: int | None) -> Iterator[Event]:
    assert step.passes is not None, "a step has a generation"
    schedules = list(step.schedules)
    for phase in step.phases:
        if phase.name == "generation":
            for item in record_passes(step.passes, replica, walked):
                yield _decode_event(item, phase.start, replica)
        elif phase.name in ("logprobs", "update"):
            _, times = schedules.pop(0)
            for stage, work, _, start, end in times.items:
                name = "forward" if work.kind == "F" else "backward"
                begin, seconds = float(start[replica]), float((end - start)[replica])
                if seconds > 0:
                    arguments = {"micro_batch": work.micro_batch, "chunk": work.chunk}
                    yield _event(name, phase.start + begin, seconds, replica, stage, arguments)
        else:
            yield from _whole(phase, replica)


def _whole(phase: Phase, replica: int) -> Iterator[Event]:
    for stage, seconds in enumerate(np.asarray(phase.busy[replica]).tolist()):
        if seconds > 0:
            yield _event(phase.name, phase.start, seconds, replica, stage, {})


def _decode_event(item: Item, offset: float, replica: int) -> Event:
    seconds = item.end - item.start
    arguments: dict[str, Any] = {"round": item.round}
    if item.num_rounds > 1 or item.lane < 0:
        arguments |= {"rounds": item.num_rounds, "busy_share": round(item.busy / seconds, 4)}
    else:
        arguments |= {"lane": item.lane, "chunk": item.chunk}
    name = "decode" if item.lane < 0 else f"lane {item.lane}"
    return _event(name, offset + item.start, seconds, replica, item.stage, arguments)


def _event(
    name: str, start: float, seconds: float, replica: int, stage: int, arguments: dict[str, Any]
) -> Event:
    return {
        "name": name,
        "ph": "X",
        "ts": start * _MICROSECONDS,
        "dur": seconds * _MICROSECONDS,
        "pid": replica,
        "tid": stage,
        "args": arguments,
    }
