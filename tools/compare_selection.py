"""Compare prompt selections with uniform at equal rollouts, on the task of examples/cpu_demo.

One task and one warm-up; from its end, for each seed, one nested run for each selection, all with
the same steps, prompts a step and completions. Seeds differ in the order of prompts, in plans and
in sampling. Runs that are there already are not repeated. Ends with a table, and writes its
figures to OUTPUT/selection.json: accuracies half-way and at the end, the share of groups that teach
nothing, and differences from uniform, pair by pair.

    python tools/compare_selection.py --output runs/selection --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
DEMO = REPOSITORY / "examples" / "cpu_demo"
SELECTIONS = ("uniform", "filter", "mopps")
FIGURES = (
    "sampled accuracy, end",
    "greedy accuracy, end",
    "sampled accuracy, half-way",
    "groups that teach nothing",
    "training reward",
)
_SAMPLED = "val-core/eval/reward/mean@4"


def run(*command: str) -> None:
    """Run a command in the repository. CalledProcessError if it fails."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    subprocess.run([sys.executable, *command], check=True, cwd=REPOSITORY, env=os.environ | threads)


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run, or none."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def options_of(output: Path) -> tuple[str, ...]:
    """What all runs have in common."""
    task = output / "task"
    return (
        str(DEMO / "config.yaml"),
        f"data.tokenizer_path={task / 'tokenizer.model'}",
        f"data.eval_path={task / 'eval.jsonl'}",
        "parallel.pipeline_model_parallel_size=1",
        "logging.tensorboard=false",
        "logging.dump_rollouts=false",
    )


def warm_up(output: Path, num_train: int) -> None:
    """The task and the warm start."""
    task = output / "task"
    if not (task / "tokenizer.model").exists():
        sizes = ("--num-train", str(num_train))
        run(str(DEMO / "make_task.py"), "--output", str(task), *sizes)
    if not (output / "sft" / "checkpoints" / "latest").exists():
        mine = (f"run_dir={output / 'sft'}", f"data.train_path={task / 'sft.jsonl'}")
        run("-m", "nested_reft_mcore", "sft", *options_of(output), *mine)


def make_runs(output: Path, seed: int, num_steps: int) -> None:
    """A run for each selection, from the same warm start."""
    for selection in SELECTIONS:
        run_dir = output / f"seed_{seed}" / selection
        lines = metrics_of(run_dir)
        if lines and lines[-1].get("step") == num_steps:
            continue
        mine = (
            f"run_dir={run_dir}",
            f"seed={seed}",
            f"data.train_path={output / 'task' / 'train.jsonl'}",
            f"data.selection.policy={selection}",
            f"train.num_steps={num_steps}",
            "evaluation.before_training=false",
            f"evaluation.interval={(num_steps + 1) // 2}",
        )
        checkpoint = ("--checkpoint", str(output / "sft" / "checkpoints"))
        run("-m", "nested_reft_mcore", "train", *options_of(output), *mine, *checkpoint)


def figures_of(run_dir: Path) -> dict[str, float]:
    """What a run comes to."""
    lines = metrics_of(run_dir)
    steps = [line for line in lines if "critic/score/mean" in line]
    judged = [line for line in steps if _SAMPLED in line]
    sampled = [line[_SAMPLED] for line in judged]
    idle = [line["critic/solve_none"] + line["critic/solve_all"] for line in steps]
    return {
        "sampled accuracy, end": sampled[-1],
        "greedy accuracy, end": judged[-1]["val-core/eval/reward/greedy"],
        "sampled accuracy, half-way": sampled[0],
        "groups that teach nothing": statistics.mean(idle),
        "training reward": statistics.mean(line["critic/score/mean"] for line in steps),
        "rollouts": sum(1 for _ in steps) * 128.0,
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds, and mean paired differences from uniform with their standard error."""
    lines = [f"{'':40}" + "".join(f"{name:>12}" for name in SELECTIONS) + "   minus uniform"]
    for figure in FIGURES:
        values = {name: [one[figure] for one in found[name]] for name in SELECTIONS}
        row = f"{figure:40}" + "".join(f"{statistics.mean(values[n]):12.3f}" for n in SELECTIONS)
        for name in SELECTIONS[1:]:
            pairs = zip(values[name], values["uniform"], strict=True)
            gaps = [a - b for a, b in pairs]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            row += f"   {name} {statistics.mean(gaps):+.3f} (se {error:.3f})"
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/selection"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-train", type=int, default=160, help="prompts; few: epochs repeat")
    parser.add_argument("--num-steps", type=int, default=30)
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    warm_up(output, arguments.num_train)
    for seed in arguments.seeds:
        make_runs(output, seed, arguments.num_steps)
    found = {
        name: [figures_of(output / f"seed_{seed}" / name) for seed in arguments.seeds]
        for name in SELECTIONS
    }
    print(f"{len(arguments.seeds)} seeds, {found['uniform'][0]['rollouts']:.0f} rollouts a run")
    print(table(found))
    record = {"seeds": arguments.seeds, "num_train": arguments.num_train, "runs": found}
    (output / "selection.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
