"""`nested-reft evaluate`: accuracy of a model on held-out prompts, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.training.evaluation import Evaluator
from nested_reft_mcore.training.judge import Judge
from nested_reft_mcore.training.policy_setup import load_policy, load_policy_tokenizer


def run_evaluation(config: Config, context: ParallelContext, output: Path | None) -> int:
    """Evaluate the model of `config`, print the metrics and write them; returns the exit code.

    Metrics and completions go to `<run_dir>/evaluate`, the metrics to `output` too if it is given.

    Raises:
        UserError: something that the config names is missing or broken.
    """
    directory = Path(config.run_dir) / "evaluate"
    policy = load_policy(config.model, config.parallel, context, config.seed)
    tokenizer = load_policy_tokenizer(config.model, config.data.tokenizer_path, policy.architecture)
    with Judge(config.reward, context) as judge:
        metrics = Evaluator(config, tokenizer, policy, judge)(directory / "completions.jsonl")
        metrics |= judge.metrics()
    if context.is_main:
        for path in (directory / "metrics.json", output):
            if path is not None:
                path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for name, value in metrics.items():
            print(f"{name:45} {value:.6g}")
        print(f"completions and metrics: {directory}", flush=True)
    return ExitCode.OK
