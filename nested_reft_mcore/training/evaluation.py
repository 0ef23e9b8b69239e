"""Accuracy of the full-depth policy on held-out prompts, greedy and sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from nested_reft_mcore.config.schema import Config, EvaluationConfig
from nested_reft_mcore.data.prompts import PromptSet, load_evaluation_prompts
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.generation import GenerationInterrupted
from nested_reft_mcore.rollout.types import RolloutBatch, SamplingParams
from nested_reft_mcore.training.judge import Judge, values_of
from nested_reft_mcore.training.policy_setup import check_room
from nested_reft_mcore.training.replicas import gather_from_replicas, is_replica_writer
from nested_reft_mcore.training.sampling import build_engine, stop_token_ids

# A step that no training step has: evaluations draw the same numbers whenever they run, so that
# two of them differ by the policy alone, and none of training's.
_EVALUATION_STEP = 1 << 40


@dataclass(frozen=True)
class _Mode:
    """One way of completing every prompt."""

    name: str
    num_samples: int
    sampling: SamplingParams


class Evaluator:
    """Held-out prompts, and what to do with them."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        policy: Policy,
        judge: Judge,
        *,
        interrupted: Callable[[], bool] | None = None,
        check: Callable[[], None] = lambda: None,
        writing: Callable[[Path], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Read the prompts. UserError for anything wrong in the file.

        `interrupted` is asked while a replica generates, by all of its processes together; `check`
        is called by every process after each generation and before anything is written, and raises
        where the evaluation is to be abandoned. `writing` is entered around writing a file.
        """
        self._interrupted = interrupted
        self._check = check
        self._writing = writing
        self._tokenizer = tokenizer
        self._policy = policy
        self._decoder = PolicyDecoder(policy)
        self._judge = judge
        self._engine = build_engine(config.rollout)
        prompts = load_evaluation_prompts(config.data, tokenizer)
        self.prompts = PromptSet(prompts.prompts[: config.evaluation.num_prompts])
        check_room(self.prompts.prompts, config.rollout.max_new_tokens, policy.architecture)
        self._modes = _modes(config, stop_token_ids(tokenizer, config.rollout.stop_tokens))

    def __call__(self, completions_path: Path | None = None) -> dict[str, float]:
        """Complete and judge every prompt; returns accuracies, lengths and counts.

        Names are verl's, `val-core/<data>/<reward>/<statistic>` with `eval` as the data: `greedy`,
        and `mean@n` over n samples a prompt. Completions go to `completions_path` if it is given,
        as JSON lines.
        """
        policy, context = self._policy, self._policy.context
        share = shard_range(len(self.prompts), context.data.rank, context.data.size)
        metrics: dict[str, float] = {"val-aux/num_prompts": float(len(self.prompts))}
        lines: list[str] = []
        for mode in self._modes:
            rollouts = None
            with suppress(GenerationInterrupted):
                rollouts = self._engine.generate(
                    self._decoder,
                    self.prompts.prompts[share.start : share.stop],
                    mode.num_samples,
                    mode.sampling,
                    policy.plan,
                    first_prompt_index=share.start,
                    detokenize=self._tokenizer.decode,
                    interrupted=self._interrupted,
                )
            self._check()
            assert rollouts is not None, "generation is interrupted by requests to stop only"
            rewards = values_of(self._judge.results(rollouts))
            metrics |= self._metrics(mode, rollouts, rewards)
            lines += _lines(mode.name, rollouts, rewards)
        self._check()
        everybody = gather_from_replicas(lines, context)
        if completions_path is not None and is_replica_writer(context) and context.data.rank == 0:
            text = "".join(line for part in everybody for line in part)
            with self._writing(completions_path):
                completions_path.parent.mkdir(parents=True, exist_ok=True)
                completions_path.write_text(text, encoding="utf-8")
        return metrics

    def _metrics(self, mode: _Mode, rollouts: RolloutBatch, rewards: Tensor) -> dict[str, float]:
        mine = (
            float(rewards.sum()),
            float(sum(len(rollout.token_ids) for rollout in rollouts.rollouts)),
            float(sum(rollout.finish_reason == "length" for rollout in rollouts.rollouts)),
            float(len(rollouts.rollouts)),
        )
        parts = gather_from_replicas(mine, self._policy.context)
        reward, length, clipped, count = (sum(column) for column in zip(*parts, strict=True))
        return {
            f"val-core/eval/reward/{mode.name}": reward / count,
            f"val-aux/eval/response_length/{mode.name}": length / count,
            f"val-aux/eval/clip_ratio/{mode.name}": clipped / count,
        }


def _modes(config: Config, stop_ids: tuple[int, ...]) -> list[_Mode]:
    evaluation: EvaluationConfig = config.evaluation
    greedy = SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        greedy=True,
        stop_token_ids=stop_ids,
        stop_strings=config.rollout.stop_strings,
        seed=config.seed,
        step=_EVALUATION_STEP,
    )
    modes = [_Mode("greedy", 1, greedy)]
    if evaluation.num_samples:
        sampled = replace(
            greedy,
            greedy=False,
            temperature=evaluation.temperature,
            top_k=evaluation.top_k,
            top_p=evaluation.top_p,
        )
        modes.append(_Mode(f"mean@{evaluation.num_samples}", evaluation.num_samples, sampled))
    return modes


def _lines(mode: str, rollouts: RolloutBatch, rewards: Tensor) -> list[str]:
    return [
        json.dumps(
            {
                "mode": mode,
                "source": rollout.prompt.source,
                "prompt": rollout.prompt.text,
                "completion": rollout.text,
                "answer": rollout.prompt.answer,
                "reward": reward,
                "finish_reason": rollout.finish_reason,
            },
            ensure_ascii=False,
        )
        + "\n"
        for rollout, reward in zip(rollouts.rollouts, rewards.tolist(), strict=True)
    ]
