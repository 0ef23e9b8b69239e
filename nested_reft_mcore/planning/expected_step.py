"""The lengths that a plan expects of one replica's step, and the rounds that they take.

No chance: the lengths are evenly spread quantiles of a law, in a fixed order. Under the same law
`nested-reft simulate` draws them, for every replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.planning.hardware import Assumptions
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.lengths import LengthLaw
from nested_reft_mcore.planning.slots import Rounds, count_rounds
from nested_reft_mcore.planning.workload import Workload, mean_response

PROMPT_SPREAD = 0.5
"""Standard deviation of the logarithm of a prompt's length: an assumption."""


@dataclass(frozen=True)
class ExpectedStep:
    """One replica's share of a step."""

    prompts: tuple[int, ...]
    """Tokens of each prompt."""
    responses: tuple[tuple[int, ...], ...]
    """Tokens of each prompt's samples."""
    rounds: Rounds
    """Of its generation."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens, a prompt once for each of its samples."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return sum(prompt * len(group) + sum(group) for prompt, group in pairs)

    @property
    def sequences(self) -> list[int]:
        """What goes into the model in an update: a sequence less its last token."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [prompt + response - 1 for prompt, group in pairs for response in group]


def prompt_law(config: Config, assumed: Assumptions) -> LengthLaw:
    """Of prompts."""
    longest = config.data.max_prompt_length
    mean = max(1.0, assumed.prompt_fill * longest)
    return LengthLaw("lognormal", mean, longest, PROMPT_SPREAD)


def response_law(config: Config, assumed: Assumptions) -> LengthLaw:
    """Of responses."""
    limit = config.rollout.max_new_tokens
    mean = max(1.0, mean_response(config, assumed))
    kind = "lognormal" if assumed.length_spread > 0 else "fixed"
    return LengthLaw(kind, mean, limit, assumed.length_spread)


def expected_step(
    config: Config, layout: Layout, workload: Workload, assumed: Assumptions, slots: int
) -> ExpectedStep:
    """The share of one replica that has so many slots."""
    laws = prompt_law(config, assumed), response_law(config, assumed)
    return step_under_laws(*laws, config, layout, workload, slots)


def step_under_laws(
    prompt: LengthLaw,
    response: LengthLaw,
    config: Config,
    layout: Layout,
    workload: Workload,
    slots: int,
) -> ExpectedStep:
    """The same for other laws of lengths than the assumed ones."""
    return _expected(
        prompt,
        response,
        workload.num_prompts,
        config.rollout.group_size,
        max(1, min(slots, workload.num_sequences)),
        layout.pipeline,
        config.rollout.max_num_batched_tokens,
    )


@lru_cache(maxsize=32)
def _expected(
    prompt: LengthLaw,
    response: LengthLaw,
    num_prompts: int,
    group_size: int,
    num_slots: int,
    num_lanes: int,
    max_num_batched_tokens: int,
) -> ExpectedStep:
    rng = np.random.default_rng(0)
    prompts = rng.permutation(prompt.quantiles(num_prompts)).tolist()
    drawn = rng.permutation(response.quantiles(num_prompts * group_size))
    responses = drawn.reshape(num_prompts, group_size).tolist()
    rounds = count_rounds(
        prompts,
        responses,
        num_slots=num_slots,
        num_lanes=num_lanes,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    return ExpectedStep(tuple(prompts), tuple(tuple(group) for group in responses), rounds)
