"""Compare prompt selections with uniform at equal rollouts, on the task of examples/cpu_demo.

For each seed: the task, a warm-up, and from its end one nested run for each selection, all with the
same steps, prompts a step and completions. Runs that are there already are not repeated. Ends with
a table, and writes it to OUTPUT/selection.json: accuracies at the end and on average over the run,
the share of groups that teach nothing, and differences from uniform, pair by pair.

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
FIGURES = {
    "sampled accuracy, end": "val-core/eval/reward/mean@4",
    "greedy accuracy, end": "val-core/eval/reward/greedy",
    "sampled accuracy, mean of evaluations": "val-core/eval/reward/mean@4",
    "groups that teach nothing": "critic/solve_none",
    "training reward": "critic/score/mean",
}


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


def make_runs(output: Path, seed: int, num_train: int, num_steps: int) -> None:
    """The warm-up of a seed, and a run for each selection."""
    room = output / f"seed_{seed}"
    task = room / "task"
    if not (task / "tokenizer.model").exists():
        sizes = ("--num-train", str(num_train), "--seed", str(seed))
        run(str(DEMO / "make_task.py"), "--output", str(task), *sizes)
    options = (
        str(DEMO / "config.yaml"),
        f"data.tokenizer_path={task / 'tokenizer.model'}",
        f"data.eval_path={task / 'eval.jsonl'}",
        "parallel.pipeline_model_parallel_size=1",
        "logging.tensorboard=false",
        "logging.dump_rollouts=false",
        f"seed={seed}",
    )
    if not (room / "sft" / "checkpoints" / "latest").exists():
        warm = (f"run_dir={room / 'sft'}", f"data.train_path={task / 'sft.jsonl'}")
        run("-m", "nested_reft_mcore", "sft", *options, *warm)
    for selection in SELECTIONS:
        lines = metrics_of(room / selection)
        if lines and lines[-1].get("step") == num_steps:
            continue
        mine = (
            f"run_dir={room / selection}",
            f"data.train_path={task / 'train.jsonl'}",
            f"data.selection.policy={selection}",
            f"train.num_steps={num_steps}",
        )
        checkpoint = ("--checkpoint", str(room / "sft" / "checkpoints"))
        run("-m", "nested_reft_mcore", "train", *options, *mine, *checkpoint)


def figures_of(run_dir: Path) -> dict[str, float]:
    """What a run comes to."""
    lines = metrics_of(run_dir)
    steps = [line for line in lines if "critic/score/mean" in line]
    judged = [line for line in steps if FIGURES["sampled accuracy, end"] in line]
    sampled = [line["val-core/eval/reward/mean@4"] for line in judged]
    idle = [line["critic/solve_none"] + line["critic/solve_all"] for line in steps]
    return {
        "sampled accuracy, end": sampled[-1],
        "greedy accuracy, end": judged[-1]["val-core/eval/reward/greedy"],
        "sampled accuracy, mean of evaluations": statistics.mean(sampled),
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
    for seed in arguments.seeds:
        make_runs(output, seed, arguments.num_train, arguments.num_steps)
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
