"""Accuracy of the policy on held-out prompts, greedy and sampled, at full depth and nested.

The same code serves `nested-reft evaluate` and the training loop. Every random number is keyed by
the seed, the set's name, the prompt's place in it, the sample and the position, so a completion is
the same at any layout, in any order, and in a part of a set as in the whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.rewards import evaluated_measure, evaluated_place
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.mcore.agreement import on_main
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rewards.base import RewardResult
from nested_reft_mcore.rollout.completion import Completion
from nested_reft_mcore.rollout.generation import GenerationInterrupted
from nested_reft_mcore.rollout.memory import MOST_SLOTS
from nested_reft_mcore.rollout.types import (
    Rollout,
    RolloutBatch,
    RolloutStats,
)
from nested_reft_mcore.training.chunks import cut, gather_on_main, my_part
from nested_reft_mcore.training.evaluation_figures import (
    Figures,
    JudgedCompletion,
    all_figures,
)
from nested_reft_mcore.training.evaluation_record import PartWriter, RawCompletion, Task
from nested_reft_mcore.training.evaluation_setup import (
    Question,
    evaluated_plans,
    evaluation_sampling,
    load_questions,
)
from nested_reft_mcore.training.judge import Judge, failure_of
from nested_reft_mcore.training.policy_setup import check_room
from nested_reft_mcore.training.replicas import gather_from_replicas, is_replica_writer
from nested_reft_mcore.training.sampling import build_engine
from nested_reft_mcore.training.voting import AnswerVotes

_log = logging.getLogger(__name__)

_MOST_LOGPROBS = 1 << 26
"""Of completions in one generation; it keeps one for every token that there could be."""
_GATHERED_AT_ONCE = 256


@dataclass(frozen=True)
class Evaluation:
    """What was found. Figures and speed are complete on rank 0 alone, metrics everywhere."""

    metrics: dict[str, float]
    figures: list[Figures]
    generated_tokens: dict[Task, int]
    """By this start, an earlier one's left out."""
    seconds: dict[Task, float]


class Evaluator:
    """Held-out prompts, and what to do with them."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        policy: Policy,
        judge: Judge,
        *,
        questions: Sequence[Question] | None = None,
        interrupted: Callable[[], bool] | None = None,
        check: Callable[[], None] = lambda: None,
        writing: Callable[[Path], AbstractContextManager[object]] = nullcontext,
        on_progress: Callable[[int, int], None] = lambda completions, tokens: None,
    ) -> None:
        """Read the prompts, unless they are given.

        Args:
            interrupted: Asked while a replica generates, by all of its processes together.
            check: Called by every process after each generation and before anything is written;
                raises where the evaluation is to be abandoned.
            writing: Entered around writing a file.
            on_progress: Hears how many completions this replica has made so far, and their tokens;
                earlier ones are not counted.

        Raises:
            UserError: a set, a prompt or a plan is wrong.
        """
        self._interrupted = interrupted
        self._check = check
        self._writing = writing
        self._on_progress = on_progress
        self._tokenizer = tokenizer
        self._policy = policy
        self._decoder = PolicyDecoder(policy)
        self._judge = judge
        self._judged_by = evaluated_place(config.reward, config.evaluation.reward)
        self._measure = evaluated_measure(config.reward, config.evaluation.reward)
        self._labels = [function.metric_name for function in config.reward.weighted]
        self._votes = AnswerVotes(config.reward, self._judged_by)
        if policy.context.is_main and self._judged_by is None:
            _log.warning(
                "evaluations give the weighted sum of %s, which is no accuracy; evaluation.reward "
                "chooses the one that says what is right",
                ", ".join(self._labels),
            )
        self._engine = build_engine(config.rollout)
        self.questions = questions if questions is not None else load_questions(config, tokenizer)
        self.prompts = tuple(question.prompt for question in self.questions)
        check_room(self.prompts, config.rollout.max_new_tokens, policy.architecture)
        self._plans = evaluated_plans(config, policy.architecture.num_layers)
        self._num_samples = config.evaluation.num_samples
        self._sampling = evaluation_sampling(config, tokenizer)
        slots = config.rollout.max_slots or MOST_SLOTS
        self._most_sequences = max(4 * slots, _MOST_LOGPROBS // config.rollout.max_new_tokens)

    @property
    def tasks(self) -> list[Task]:
        """Every policy, greedy and, if there are samples, sampled."""
        modes = ("greedy", "sampled") if self._num_samples else ("greedy",)
        return [Task(policy, mode) for policy in self._plans for mode in modes]

    @property
    def num_completions(self) -> int:
        """In all."""
        return sum(self._group_size(task) for task in self.tasks) * len(self.questions)

    def __call__(
        self,
        completions_path: Path | None = None,
        *,
        earlier: Sequence[RawCompletion] = (),
        writer: PartWriter | None = None,
    ) -> Evaluation:
        """Complete and judge every prompt. Every process calls it with the same `earlier`.

        Args:
            completions_path: JSON lines to write, every completion with prompt, answer and reward.
            earlier: Completions that an evaluation with the same settings has left.
            writer: Gets each new completion of this replica as soon as it ends.
        """
        context = self._policy.context
        rows: list[_Row] = []
        tokens: dict[Task, int] = {}
        seconds: dict[Task, float] = {}
        self._progress = [0, 0]
        with self._votes:
            for task in self.tasks:
                old = [one for one in earlier if one.task == task]
                batch = self._complete(task, old, writer)
                results = self._judge.results(batch)
                speeds = gather_from_replicas(
                    (batch.stats.generated_tokens, batch.stats.seconds), context
                )
                tokens[task] = sum(count for count, _ in speeds)
                seconds[task] = max(time for _, time in speeds)
                if is_replica_writer(context):
                    rows += self._gather(self._rows(task, batch, results))
        self._check()
        places = {(q.prompt.dataset, q.row): i for i, q in enumerate(self.questions)}
        rows.sort(key=lambda row: (places[row.judged.dataset, row.judged.row], row.judged.sample))
        rows.sort(key=lambda row: self.tasks.index(Task(row.judged.policy, row.judged.mode)))
        if completions_path is not None and context.is_main:
            with self._writing(completions_path):
                completions_path.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(row.line for row in rows)
                completions_path.write_text(text, encoding="utf-8")
        judged = [row.judged for row in rows]
        figures = all_figures(judged, self._measure) if context.is_main else []
        metrics = on_main(lambda: self._metrics(figures), context)
        return Evaluation(metrics, figures, tokens, seconds)

    def _metrics(self, figures: Sequence[Figures]) -> dict[str, float]:
        found = {"val-aux/num_prompts": float(len(self.questions))}
        for one in figures:
            found |= one.metrics()
        return found

    def _group_size(self, task: Task) -> int:
        return 1 if task.mode == "greedy" else self._num_samples

    def _complete(
        self, task: Task, earlier: Sequence[RawCompletion], writer: PartWriter | None
    ) -> RolloutBatch:
        """This replica's completions of a task, those of earlier starts on the first replica."""
        context, size, plan = self._policy.context, self._group_size(task), self._plans[task.policy]
        kept = self._kept(earlier, size)
        missing = [q for q in self.questions if (q.prompt.dataset, q.row) not in kept]
        old = [rollout for group in kept.values() for rollout in group]
        rollouts = old if context.data.rank == 0 else []
        stats = []
        with self._policy.nested(plan):
            per_replica = max(1, self._most_sequences // size)
            for block in cut(len(missing), per_replica * context.data.size):
                part = my_part(block, context)
                batch = self._generate(task, missing[part.start : part.stop], plan, writer)
                rollouts = [*rollouts, *batch.rollouts]
                stats.append(batch.stats)
        tokens = sum(one.generated_tokens for one in stats)
        seconds = sum(one.seconds for one in stats)
        return RolloutBatch(tuple(rollouts), size, plan, RolloutStats(tokens, seconds))

    def _generate(
        self,
        task: Task,
        questions: Sequence[Question],
        plan: LayerSkipPlan,
        writer: PartWriter | None,
    ) -> RolloutBatch:
        def finished(completion: Completion) -> None:
            if not is_replica_writer(self._policy.context):
                return
            question, reason = questions[completion.prompt], completion.finish_reason
            assert reason is not None, "a completion that has ended says why"
            tokens = tuple(completion.token_ids)
            if writer is not None:
                writer.add(
                    RawCompletion(
                        *(task.policy, task.mode, question.prompt.dataset, question.row),
                        *(completion.sample, tokens, reason),
                    )
                )
            self._report(1, len(tokens))

        batch = None
        with suppress(GenerationInterrupted):
            batch = self._engine.generate(
                self._decoder,
                [question.prompt for question in questions],
                self._group_size(task),
                replace(self._sampling, greedy=task.mode == "greedy"),
                plan,
                prompt_indices=[question.key for question in questions],
                on_finished=finished,
                detokenize=self._tokenizer.decode,
                interrupted=self._interrupted,
            )
        self._check()
        assert batch is not None, "generation is interrupted by requests to stop only"
        return batch

    def _kept(
        self, earlier: Sequence[RawCompletion], size: int
    ) -> dict[tuple[str, int], list[Rollout]]:
        """Whole groups of earlier completions, by set and row."""
        questions = {(q.prompt.dataset, q.row): q for q in self.questions}
        groups: dict[tuple[str, int], list[RawCompletion]] = {}
        for one in earlier:
            groups.setdefault((one.dataset, one.row), []).append(one)
        return {
            place: [self._as_rollout(one, questions[place]) for one in group]
            for place, group in groups.items()
            if place in questions and [one.sample for one in group] == list(range(size))
        }

    def _as_rollout(self, completion: RawCompletion, question: Question) -> Rollout:
        """Its log-probs are not known any more, and nobody asks for them."""
        return Rollout(
            prompt=question.prompt,
            prompt_index=question.key,
            sample_index=completion.sample,
            token_ids=completion.token_ids,
            behavior_logprobs=(0.0,) * len(completion.token_ids),
            finish_reason=completion.finish_reason,
            text=self._tokenizer.decode(completion.token_ids),
        )

    def _rows(self, task: Task, batch: RolloutBatch, results: Sequence[RewardResult]) -> list[_Row]:
        rows_of = {question.key: question.row for question in self.questions}
        verdicts = [self._verdict(result) for result in results]
        answers = self._votes(batch, [verdict.reward for verdict in verdicts])
        return [
            _Row.of(task, rows_of[rollout.prompt_index], rollout, verdict, answer)
            for rollout, verdict, answer in zip(batch.rollouts, verdicts, answers, strict=True)
        ]

    def _verdict(self, result: RewardResult) -> _Verdict:
        place, several = self._judged_by, len(self._labels) > 1
        return _Verdict(
            reward=result.value if place is None else result.components[place],
            components=dict(zip(self._labels, result.components, strict=True)) if several else None,
            failure=failure_of(result),
        )

    def _gather(self, mine: list[_Row]) -> list[_Row]:
        """Those of all replicas, on rank 0, in messages that fit into memory."""
        context = self._policy.context
        most = max(gather_from_replicas(len(mine), context))
        return [
            row
            for block in cut(most, _GATHERED_AT_ONCE)
            for part in gather_on_main(mine[block.start : block.stop], context)
            for row in part
        ]

    def _report(self, completions: int, tokens: int) -> None:
        self._progress[0] += completions
        self._progress[1] += tokens
        self._on_progress(*self._progress)


@dataclass(frozen=True)
class _Verdict:
    reward: float
    components: dict[str, float] | None
    """What each of several functions gave, by its label."""
    failure: str | None
    """Why it could not be judged."""


@dataclass(frozen=True)
class _Row:
    """A completion as the figures and as the file of completions take it."""

    judged: JudgedCompletion
    line: str

    @classmethod
    def of(
        cls,
        task: Task,
        row: int,
        rollout: Rollout,
        verdict: _Verdict,
        answer: int | None,
    ) -> _Row:
        prompt = rollout.prompt
        judged = JudgedCompletion(
            policy=task.policy,
            mode=task.mode,
            dataset=prompt.dataset,
            row=row,
            sample=rollout.sample_index,
            reward=verdict.reward,
            answer=answer,
            num_tokens=len(rollout.token_ids),
            is_truncated=rollout.is_truncated,
            labels=prompt.labels,
        )
        line: dict[str, Any] = {
            "dataset": prompt.dataset,
            "policy": task.policy,
            "mode": task.mode,
            "row": row,
            "sample": rollout.sample_index,
            "source": prompt.source,
            "prompt": prompt.text,
            "completion": rollout.text,
            "answer": prompt.answer,
            "reward": verdict.reward,
            "finish_reason": rollout.finish_reason,
            "num_tokens": len(rollout.token_ids),
            "labels": dict(prompt.labels),
        }
        if verdict.components is not None:
            line["components"] = verdict.components
        if verdict.failure is not None:
            line["judge_failure"] = verdict.failure
        return cls(judged, json.dumps(line, ensure_ascii=False) + "\n")
