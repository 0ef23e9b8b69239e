"""Where each run of a study stands, by the queue and the run directories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from nested_reft_mcore.studies.grid import Grid
from nested_reft_mcore.studies.plan_table import columns
from nested_reft_mcore.studies.prediction import Prediction
from nested_reft_mcore.studies.queue import queue_states
from nested_reft_mcore.studies.states import RunState, is_being_run, read_record, state_of


def status_of(grid: Grid, predictions: Mapping[str, Prediction]) -> dict[str, RunState]:
    """The state of every run by its name, in the study's order; struck points follow."""
    being_run = is_being_run(grid.output)
    queued = queue_states(grid.output)
    states: dict[str, RunState] = {}
    for run in grid.runs:
        state = state_of(run, being_run=being_run)
        task = queued.get(run.name)
        record = read_record(run.directory)
        is_newer = task is not None and (record is None or task.submitted > record.started)
        if task is not None and task.is_active:
            # Whatever the study says by now: a task has the options of its submission.
            state = task.state(state.step)
        elif task is not None and is_newer and not (state.kind == "finished" or state.begins_anew):
            state = task.state(state.step)
        elif state.kind == "missing" and not predictions[run.name].fits:
            state = RunState("does not fit", detail=predictions[run.name].problem or "")
        states[run.name] = state
    for name, reason in grid.struck:
        states[name] = RunState("does not fit", detail=reason)
    return states


def status_text(grid: Grid, states: Mapping[str, RunState]) -> str:
    """A line a run, and how many there are of each kind."""
    steps = {run.name: run.num_steps for run in grid.runs}
    rows = [(name, state.describe(steps.get(name, 0))) for name, state in states.items()]
    kinds = Counter(state.kind for state in states.values())
    told = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    return "\n".join([*columns(("run", "state"), rows), "", told.replace("missing", "not started")])
