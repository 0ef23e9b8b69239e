"""What a study keeps of its runs: one JSON line a run, enough to remake tables and figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan import EVALUATION_FILE, Study, StudyRun, read_outcome, state_of

from nested_reft_mcore.observability.environment import ENVIRONMENT_FILE
from nested_reft_mcore.observability.tracking import read_metrics

RESULTS_DIRECTORY = Path(__file__).with_name("results")

CURVES = {
    "reward": "critic/rewards/mean",
    "kl": "rollout_corr/kl",
    "ess": "nested/ess",
    "num_skipped": "nested/num_skipped",
}
"""Kept for every step."""
MEDIANS = {
    "seconds_per_step": "timing_s/step",
    "seconds_generating": "timing_s/gen",
    "seconds_updating": "timing_s/update_actor",
    "tokens_per_second": "perf/generated_tokens_per_second",
}
"""Kept as the median over the steps."""
MEANS = {
    "response_length": "response_length/mean",
    "skip_ratio": "nested/skip_ratio",
    "ratio_p05": "nested/ratio_p05",
    "grad_norm": "actor/grad_norm",
}
"""Kept as the mean over the steps."""
GREEDY = "val-core/eval/reward/greedy"
SAMPLED = "val-core/eval/reward/mean@"


def collect(study: Study, root: Path, output: Path) -> dict[Path, int]:
    """Write the finished runs of each setup to `<setup>.jsonl`; returns how many each file has.

    Runs that an earlier collection wrote and that are not below `root` now are kept.
    """
    runs = [run for run in study.runs if run.start and state_of(run, root) == "finished"]
    files: dict[Path, dict[str, dict[str, Any]]] = {}
    for run in runs:
        path = output / f"{run.setup.name}.jsonl"
        rows = files.setdefault(path, {row["name"]: row for row in read_rows(path)})
        rows[run.name] = row_of(run, root)
    for path, rows in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(rows[name]) + "\n" for name in sorted(rows))
        path.write_text("".join(lines), encoding="utf-8")
    return {path: len(rows) for path, rows in files.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `collect` wrote; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row_of(run: StudyRun, root: Path) -> dict[str, Any]:
    """A finished run in one record. ValueError if its metrics hold no step or no evaluation."""
    directory = root / run.name
    outcome = read_outcome(directory)
    assert outcome is not None, "only finished runs are collected"
    environment = json.loads((directory / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    lines = read_metrics(directory)
    steps = [line for line in lines if CURVES["reward"] in line]
    evaluations = [evaluation_of(line) for line in lines if GREEDY in line]
    for step, name in ((0, run.start), (len(steps), run.name)):
        apart = root / str(name) / EVALUATION_FILE
        if apart.is_file():
            metrics = json.loads(apart.read_text(encoding="utf-8"))["metrics"]
            evaluations.append(evaluation_of({"step": step, **metrics}))
    if not steps or not evaluations:
        raise ValueError(f"{directory}: no steps or no evaluation in its metrics")
    row: dict[str, Any] = {
        "name": run.name,
        "setup": run.setup.name,
        "arm": run.arm,
        "seed": run.seed,
        "start": run.start,
        "options": run.options,
        "commit": (environment.get("git") or {}).get("commit"),
        "machine": environment.get("cpu"),
        "date": environment["time"],
        "seconds": outcome["seconds"],
        "cpu_seconds": outcome["cpu_seconds"],
        "evaluations": evaluations,
        "num_steps": len(steps),
    }
    for key, name in MEDIANS.items():
        row[key] = _rounded(statistics.median(_values(steps, name)))
    for key, name in MEANS.items():
        row[key] = _rounded(statistics.fmean(_values(steps, name)))
    accepted = _values(steps, "nested/accept_rate")
    row["accept_rate"] = _rounded(statistics.fmean(accepted)) if accepted else None
    row["curves"] = {
        key: [_rounded(value) for value in _values(steps, name)] for key, name in CURVES.items()
    }
    return row


def evaluation_of(line: dict[str, Any]) -> dict[str, float]:
    """Step, greedy and sampled accuracy of the full policy, number of prompts."""
    sampled = next(key for key in line if key.startswith(SAMPLED))
    return {
        "step": line["step"],
        "greedy": line[GREEDY],
        "sampled": line[sampled],
        "prompts": line["val-aux/num_prompts"],
    }


def _values(steps: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in steps if line.get(name) is not None]


def _rounded(value: float) -> float:
    """Four significant digits: what a table or a figure can show."""
    return float(f"{value:.4g}")
