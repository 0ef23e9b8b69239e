"""What an evaluation asks, of which policies, and how it draws."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.prompts import load_evaluation_prompts
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.rollout.types import Prompt, SamplingParams
from nested_reft_mcore.training.evaluation_figures import FULL
from nested_reft_mcore.training.sampling import stop_token_ids

# A step that no training step has: evaluations draw the same numbers whenever they run, so that
# two of them differ by the policy alone, and none of training's.
_EVALUATION_STEP = 1 << 40


@dataclass(frozen=True)
class Question:
    """A held-out prompt and its place."""

    row: int
    """Place in its set, from 0, prompts that were left out not counted."""
    prompt: Prompt

    @property
    def key(self) -> int:
        """What keys its random numbers: the set's name and the place."""
        return (zlib.crc32(self.prompt.dataset.encode()) & 0x7FFFFFFF) << 32 | self.row


def load_questions(config: Config, tokenizer: Tokenizer) -> list[Question]:
    """The held-out prompts, of each set as many as `evaluation.num_prompts`, evenly spread.

    Sets are often sorted by subject or difficulty: their beginning would not stand for them.

    Raises:
        UserError: a set is missing or broken.
    """
    by_set: dict[str, list[Question]] = {}
    for prompt in load_evaluation_prompts(config.data, tokenizer).prompts:
        questions = by_set.setdefault(prompt.dataset, [])
        questions.append(Question(len(questions), prompt))
    found: list[Question] = []
    for questions in by_set.values():
        count = min(len(questions), config.evaluation.num_prompts or len(questions))
        found += [questions[i * len(questions) // count] for i in range(count)]
    return found


def evaluated_plans(config: Config, num_layers: int) -> dict[str, LayerSkipPlan]:
    """What is evaluated, by its name: the full policy first, then those of `skip_layers`.

    Raises:
        UserError: a list of layers cannot be read, or names layers that are not there.
    """
    plans = {FULL: LayerSkipPlan.full(num_layers)}
    for text in config.evaluation.skip_layers:
        try:
            plan = LayerSkipPlan.parse(text, num_layers)
        except ValueError as error:
            raise UserError(f"evaluation.skip_layers (--skip-layers) {text!r}: {error}") from error
        if plan.skipped:
            plans[plan.describe()] = plan
    return plans


def evaluation_sampling(config: Config, tokenizer: Tokenizer) -> SamplingParams:
    """How samples are drawn; greedy completions differ in `greedy` alone.

    Raises:
        UserError: a stop token is none.
    """
    return SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.evaluation.temperature,
        top_k=config.evaluation.top_k,
        top_p=config.evaluation.top_p,
        stop_token_ids=stop_token_ids(tokenizer, config.rollout.stop_tokens),
        stop_strings=config.rollout.stop_strings,
        seed=config.seed,
        step=_EVALUATION_STEP,
    )
