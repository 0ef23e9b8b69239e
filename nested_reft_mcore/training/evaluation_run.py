"""`nested-reft evaluate`: accuracy of a model on held-out prompts, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.hf.config import model_source
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.training.evaluation import Evaluator
from nested_reft_mcore.training.judge import Judge
from nested_reft_mcore.training.policy_setup import load_policy, load_policy_tokenizer


def run_evaluation(config: Config, context: ParallelContext, output: Path | None) -> int:
    """Evaluate the model of `config`, print the metrics and write them; returns the exit code.

    Metrics go to `output`, completions beside it; by default both to `<run_dir>/evaluate`.

    Raises:
        UserError: something that the config names is missing or broken.
    """
    directory = Path(config.run_dir) / "evaluate"
    metrics_path = output or directory / "metrics.json"
    completions_path = directory / "completions.jsonl"
    if output is not None:
        completions_path = output.with_suffix(".completions.jsonl")
    policy = load_policy(config.model, config.parallel, context, config.seed)
    tokenizer = load_policy_tokenizer(config.model, config.data.tokenizer_path, policy.architecture)
    with Judge(config.reward, context) as judge:
        metrics = Evaluator(config, tokenizer, policy, judge)(completions_path)
        metrics |= judge.metrics()
    if context.is_main:
        metrics_path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        print(f"weights: {model_source(config.model)}")
        for name, value in metrics.items():
            print(f"{name:45} {value:.6g}")
        print(f"metrics: {metrics_path}\ncompletions: {completions_path}", flush=True)
    return ExitCode.OK
