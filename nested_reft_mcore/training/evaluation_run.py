"""`nested-reft evaluate`: accuracy of a model on held-out prompts, and nothing else."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.checkpoints.publish import write_whole
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import WEIGHTED_SUM, evaluated_place
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.jsonl_writer import check_output_file
from nested_reft_mcore.hf.config import model_architecture, model_source
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.faults import fault_point
from nested_reft_mcore.mcore.agreement import on_main
from nested_reft_mcore.observability.environment import environment_report
from nested_reft_mcore.observability.progress import Progress, ProgressMode
from nested_reft_mcore.training.evaluation import Evaluation, Evaluator
from nested_reft_mcore.training.evaluation_figures import Estimate, Figures
from nested_reft_mcore.training.evaluation_record import (
    Parts,
    RawCompletion,
    check_same_settings,
    read_object,
)
from nested_reft_mcore.training.evaluation_setup import (
    Question,
    evaluated_plans,
    load_questions,
)
from nested_reft_mcore.training.evaluation_table import print_figures
from nested_reft_mcore.training.judge import Judge
from nested_reft_mcore.training.policy_setup import load_policy, load_policy_tokenizer
from nested_reft_mcore.training.replicas import is_replica_writer
from nested_reft_mcore.training.weights_identity import weights_identity

_SECONDS_BETWEEN_LINES = 10.0
"""On a console that is no terminal."""


@dataclass(frozen=True)
class Outputs:
    """Where an evaluation is written."""

    figures: Path
    completions: Path
    parts: Path

    @classmethod
    def of(cls, run_dir: str, output: Path | None) -> Outputs:
        """Beside `output`, or in `<run_dir>/evaluate`."""
        if output is None:
            directory = Path(run_dir) / "evaluate"
            return cls(
                directory / "metrics.json", directory / "completions.jsonl", directory / "parts"
            )
        return cls(output, output.with_suffix(".completions.jsonl"), output.with_suffix(".parts"))


def run_evaluation(
    config: Config, context: ParallelContext, output: Path | None, *, restart: bool = False
) -> int:
    """Evaluate the model of `config`, print the figures and write them; returns the exit code.

    Figures go to `output`, completions beside it; by default both to `<run_dir>/evaluate`. What a
    killed evaluation with the same settings has left is not done again, and a finished one is only
    printed. `restart` throws away what is there.

    Raises:
        UserError: something that the config names is missing or broken, or what is there was made
            with other settings.
    """
    outputs = Outputs.of(config.run_dir, output)
    check_output_file(outputs.figures)
    architecture = model_architecture(config.model)
    tokenizer = load_policy_tokenizer(config.model, config.data.tokenizer_path, architecture)
    questions = load_questions(config, tokenizer)
    plans = list(evaluated_plans(config, architecture.num_layers))
    parts = Parts(outputs.parts)

    def begin() -> tuple[dict[str, Any], bool, list[RawCompletion]]:
        settings = evaluation_settings(config, questions, plans)
        if outputs.figures.exists() and not restart:
            found = read_object(outputs.figures).get("settings", {})
            check_same_settings(found, settings, outputs.figures)
            return settings, True, []
        outputs.figures.parent.mkdir(parents=True, exist_ok=True)
        outputs.figures.unlink(missing_ok=True)
        return settings, False, parts.begin(settings, restart=restart)

    settings, is_finished, earlier = on_main(begin, context)
    if is_finished:
        if context.is_main:
            _show(outputs, config, "was finished before; --restart does it again")
        return ExitCode.OK
    with Judge(config.reward, context) as judge:
        policy = load_policy(config.model, config.parallel, context, config.seed)
        progress = _EvaluationProgress(config, context, len(earlier))
        evaluator = Evaluator(
            config,
            tokenizer,
            policy,
            judge,
            questions=questions,
            interrupted=_moments(context.rank),
            on_progress=progress.show,
        )
        writer = parts.open(context.data.rank) if is_replica_writer(context) else None
        with progress.over(evaluator.num_completions) as shown:
            evaluation = evaluator(outputs.completions, earlier=earlier, writer=writer)
            shown.finish()
        if writer is not None:
            writer.close()
        metrics = evaluation.metrics | judge.metrics()
    if context.is_main:
        content = _content(config, settings, evaluation, metrics, context)
        write_whole(outputs.figures, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        parts.remove()
        _show(outputs, config, _speeds(evaluation))
    return ExitCode.OK


def _moments(rank: int) -> Callable[[], bool]:
    """Asked every few tokens; nothing to save, so nobody is interrupted but by a test."""
    questions = itertools.count()

    def interrupted() -> bool:
        fault_point("mid-evaluation", next(questions), rank)
        return False

    return interrupted


def evaluation_settings(
    config: Config, questions: Sequence[Question], policies: Sequence[str]
) -> dict[str, Any]:
    """All that decides the figures; not the layout, nor where files lie."""
    digests: dict[str, Any] = {}
    for question in questions:
        prompt = question.prompt
        key = (question.row, prompt.token_ids, prompt.answer, prompt.labels)
        count, digest = digests.setdefault(prompt.dataset, (0, hashlib.sha256()))
        digest.update(repr(key).encode())
        digests[prompt.dataset] = (count + 1, digest)
    rollout, evaluation = config.rollout, config.evaluation
    functions, place = config.reward.weighted, evaluated_place(config.reward, evaluation.reward)
    by = WEIGHTED_SUM if place is None else functions[place].metric_name
    judged_by = {"judged_by": by} if len(functions) > 1 else {}
    return {
        "weights": weights_identity(config.model, config.seed),
        "dtype": config.model.dtype,
        "policies": list(policies),
        "data": {
            name: {"num_prompts": count, "fingerprint": digest.hexdigest()[:16]}
            for name, (count, digest) in digests.items()
        },
        "reward": config.reward.model_dump(mode="json", exclude={"num_workers"}),
        **judged_by,
        "sampling": {
            "num_samples": evaluation.num_samples,
            "temperature": evaluation.temperature,
            "top_k": evaluation.top_k,
            "top_p": evaluation.top_p,
            "max_new_tokens": rollout.max_new_tokens,
            "stop_tokens": list(rollout.stop_tokens),
            "stop_strings": list(rollout.stop_strings),
        },
        "seed": config.seed,
    }


def _content(
    config: Config,
    settings: dict[str, Any],
    evaluation: Evaluation,
    metrics: dict[str, float],
    context: ParallelContext,
) -> dict[str, Any]:
    """What is written: settings, figures, flat metrics, and where they come from."""
    return {
        "model": model_source(config.model),
        "settings": settings,
        "metrics": metrics,
        "figures": [asdict(one) for one in evaluation.figures],
        "speed": [
            {**asdict(task), "generated_tokens": tokens, "seconds": evaluation.seconds[task]}
            for task, tokens in evaluation.generated_tokens.items()
        ],
        "config": config.model_dump(mode="json"),
        "environment": environment_report(context.world_size),
    }


def _show(outputs: Outputs, config: Config, remark: str) -> None:
    found = read_object(outputs.figures)
    try:
        figures = [_figures_from(one) for one in found["figures"]]
        counts = [f"{found['metrics'][f'reward/{name}']:.0f} {name}" for name in _JUDGE_COUNTS]
    except (KeyError, TypeError) as error:
        raise UserError(f"{outputs.figures}: no figures of `evaluate`: {error}") from error
    print(f"model: {model_source(config.model)}")
    print_figures(figures)
    print(f"{remark}\njudging: {', '.join(counts)}")
    print(f"figures: {outputs.figures}\ncompletions: {outputs.completions}", flush=True)


_JUDGE_COUNTS = ("timeouts", "errors")


def _figures_from(record: dict[str, Any]) -> Figures:
    estimates = {
        name: {key: Estimate(**value) for key, value in record[name].items()}
        for name in ("estimates", "change")
    }
    return Figures(**{**record, **estimates})


def _speeds(evaluation: Evaluation) -> str:
    parts = []
    for task, tokens in evaluation.generated_tokens.items():
        seconds = evaluation.seconds[task]
        rate = f" ({tokens / seconds:,.0f} tokens/s)" if seconds else ""
        policy = task.policy if task.policy == "full" else f"skip {task.policy}"
        parts.append(f"{policy}, {task.mode}: {tokens:,} tokens in {seconds:.1f} s{rate}")
    return "\n".join(parts)


class _EvaluationProgress:
    """How many completions are done, on rank 0: its own replica stands for all."""

    def __init__(self, config: Config, context: ParallelContext, num_earlier: int) -> None:
        self._mode: ProgressMode = config.logging.progress if context.is_main else "off"
        self._num_replicas = context.data.size
        self._num_earlier = num_earlier
        self._pause = 0.2 if sys.stdout.isatty() else _SECONDS_BETWEEN_LINES
        self._last_line = self._started = time.monotonic()

    def over(self, num_completions: int) -> _EvaluationProgress:
        """So many in all replicas."""
        self._total = num_completions
        self._progress = Progress(
            self._mode, num_completions, start_step=self._num_earlier, title="evaluate"
        )
        return self

    def __enter__(self) -> _EvaluationProgress:
        self._progress.__enter__()
        if self._num_earlier:
            self._progress.update(self._num_earlier, {})
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def show(self, completions: int, tokens: int) -> None:
        """After so many of this replica, in this start."""
        now = time.monotonic()
        if self._mode == "off" or now - self._last_line < self._pause:
            return
        self._last_line = now
        rate = tokens * self._num_replicas / (now - self._started)
        done = min(self._total, self._num_earlier + completions * self._num_replicas)
        self._progress.update(done, {"perf/throughput": rate})

    def finish(self) -> None:
        """All is done."""
        self._progress.update(self._total, {})
