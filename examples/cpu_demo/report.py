"""Compare the two runs of the demo in one table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nested_reft_mcore.observability.tracking import METRICS_FILE, read_metrics

ARMS = {"on-policy": "on_policy", "nested": "nested"}
PHASES = {
    "generation": "timing_s/gen",
    "reward": "timing_s/reward",
    "update": "timing_s/update_actor",
    "save": "timing_s/save_checkpoint",
}


class Arm:
    """One run of the demo, as its directory tells it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines = read_metrics(directory / METRICS_FILE)
        self.steps = [line for line in self.lines if "critic/rewards/mean" in line]
        self.evaluations = [line for line in self.lines if "val-aux/num_prompts" in line]

    def evaluated(self, name: str) -> tuple[float, float]:
        """A metric of the first and of the last evaluation."""
        return float(self.evaluations[0][name] or 0), float(self.evaluations[-1][name] or 0)

    def mean(self, name: str, form: str) -> str:
        """A metric's mean over the steps."""
        return form.format(statistics.mean(self._values(name)))

    def median(self, name: str, form: str) -> str:
        """A metric's median over the steps."""
        return form.format(statistics.median(self._values(name)))

    def _values(self, name: str) -> list[float]:
        return [float(line[name] or 0) for line in self.steps if line.get(name) is not None]

    def seconds(self, name: str) -> float:
        """Time of a phase over the whole run; saving happens once, at the end."""
        return sum(float(line[name] or 0) for line in self.lines if name in line)

    def style_shares(self) -> tuple[float, float]:
        """Share of sampled answers that state the running values, before and after."""
        files = sorted((self.directory / "evaluation").glob("step_*.jsonl"))
        return _share(files[0]), _share(files[-1])


def _share(path: Path) -> float:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sampled = [row["completion"] for row in rows if row["mode"] != "greedy"]
    return sum(text.lstrip().startswith(">") for text in sampled) / len(sampled)


def _change(values: tuple[float, float], form: str = "{:.3f}") -> str:
    return f"{form.format(values[0])} -> {form.format(values[1])}"


def comparison(arms: dict[str, Arm]) -> Table:
    """The table, one column a run."""
    first = next(iter(arms.values()))
    num_prompts = int(first.evaluated("val-aux/num_prompts")[0])
    sampled = next(key for key in first.evaluations[0] if "/reward/mean@" in key)
    samples = sampled.rpartition("@")[2]
    lengths = sampled.replace("val-core/eval/reward", "val-aux/eval/response_length")
    rows: dict[str, Callable[[Arm], str]] = {
        "layers skipped in rollouts": lambda arm: arm.mean("nested/num_skipped", "{:g} of 12"),
        f"greedy accuracy ({num_prompts} prompts)": lambda arm: _change(
            arm.evaluated("val-core/eval/reward/greedy")
        ),
        f"sampled accuracy ({num_prompts} x {samples})": lambda arm: _change(
            arm.evaluated(sampled)
        ),
        "sampled response length, tokens": lambda arm: _change(arm.evaluated(lengths), "{:.1f}"),
        "share that states running values": lambda arm: _change(arm.style_shares(), "{:.2f}"),
        "generated tokens/s, median of steps": lambda arm: arm.median(
            "perf/generated_tokens_per_second", "{:,.0f}"
        ),
        "KL(behavior || target), nats a token": lambda arm: arm.mean("rollout_corr/kl", "{:.4f}"),
        "effective sample size": lambda arm: arm.mean("nested/ess", "{:.3f}"),
        "steps": lambda arm: str(len(arm.steps)),
    }
    for label, name in PHASES.items():
        rows[f"seconds in {label}"] = lambda arm, name=name: f"{arm.seconds(name):.1f}"
    table = Table(title="On-policy against nested rollouts, from the same warm start")
    table.add_column("before -> after where it changes")
    for name in arms:
        table.add_column(name, justify="right")
    for label, cell in rows.items():
        table.add_row(label, *(cell(arm) for arm in arms.values()))
    return table


def _command() -> str:
    """How to call the command line from here."""
    beside = Path(sys.executable).with_name("nested-reft")
    if shutil.which("nested-reft") or not beside.is_file():
        return "nested-reft"
    return os.path.relpath(beside)


def main() -> None:
    """Print the table, where everything lies, and what to try next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory that run.sh wrote to")
    output = parser.parse_args().output
    arms = {name: Arm(output / directory) for name, directory in ARMS.items()}
    console = Console(width=100, highlight=False)
    console.print(comparison(arms))
    console.print(
        "One run of each from one seed: differences in accuracy below about 0.05 are noise."
    )
    console.print(
        "At this size decoding is overhead: leaving layers out shows no gain in tokens/s."
    )
    console.print("Runs: " + "  ".join(str(arm.directory) for arm in arms.values()))
    config = os.path.relpath(Path(__file__).with_name("config.yaml"))
    console.print("Try next, three layers and a bounded importance weight:")
    console.print(
        f"  {_command()} train {config} --checkpoint {output}/sft/checkpoints \\\n"
        f"    nested.num_skipped=3 algorithm.rollout_is=retrace run_dir={output}/retrace"
    )


if __name__ == "__main__":
    main()
