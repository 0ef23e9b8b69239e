"""One timed generation: fixed random prompts, a fixed number of tokens, one plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.bench.workload import Timing
from nested_reft_mcore.mcore.agreement import barrier
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.generation import ROUNDS_BETWEEN_QUESTIONS
from nested_reft_mcore.rollout.scheduler import Batching
from nested_reft_mcore.rollout.types import Prompt, SamplingParams


class Generator:
    """Generates with a policy as often as asked, and tells the time."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._decoder = PolicyDecoder(policy)

    @property
    def uses_native_kernels(self) -> bool:
        """Whether this process decodes with the native kernels."""
        return self._decoder.uses_native_kernels

    def run(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        new_tokens: int,
        plan: LayerSkipPlan,
        *,
        max_slots: int | None = None,
        batching: Batching = "continuous",
        seed: int = 0,
    ) -> Timing:
        """Generate at temperature 1 with no stop token. Every process of the policy calls it.

        `max_slots`: sequences decoded at the same time; all of them if left out.
        """
        engine = RolloutEngine(max_slots or len(prompts) * num_samples, batching=batching)
        marks: list[float] = []

        def mark() -> bool:
            # Asked every few tokens, hence a clock of decoding alone.
            marks.append(time.perf_counter())
            return False

        sampling = SamplingParams(max_new_tokens=new_tokens, seed=seed)
        barrier()
        started = time.perf_counter()
        with self._policy.nested(plan):
            batch = engine.generate(
                self._decoder, prompts, num_samples, sampling, plan, interrupted=mark
            )
        seconds = time.perf_counter() - started
        stats = batch.stats
        return Timing(
            seconds=seconds,
            step_seconds=_step_seconds(marks),
            waiting_shares=stats.waiting_shares,
            kv_cache_bytes=stats.kv_cache_bytes,
            num_slots=stats.num_slots,
            prefilled_tokens=stats.prefilled_tokens,
        )


def as_prompts(token_ids: Sequence[Sequence[int]]) -> list[Prompt]:
    """Prompts without text."""
    return [Prompt(tuple(ids), "") for ids in token_ids]


def _step_seconds(marks: Sequence[float]) -> float | None:
    """The median between two marks, for one token."""
    gaps = [later - earlier for earlier, later in pairwise(marks)]
    return statistics.median(gaps) / ROUNDS_BETWEEN_QUESTIONS if gaps else None
