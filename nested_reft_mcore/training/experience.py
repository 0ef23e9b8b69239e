"""Where a step's rollouts and rewards come from: generated now, or replayed from an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from nested_reft_mcore.algorithm.advantages import equal_groups
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.prompts import PromptSet
from nested_reft_mcore.data.selection import build_selector
from nested_reft_mcore.data.stream import PromptStream, shard_range
from nested_reft_mcore.data.tokenizers import Tokenizer
from nested_reft_mcore.launch.faults import fault_point
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.rollout.dump import load_rollouts
from nested_reft_mcore.rollout.generation import GenerationInterrupted
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.dynamic_sampling import sample_dynamically
from nested_reft_mcore.training.judge import Judge
from nested_reft_mcore.training.replicas import gather_from_replicas
from nested_reft_mcore.training.sampling import build_engine, training_sampling


@dataclass(frozen=True)
class Experience:
    """This replica's share of a step's global batch, whole groups."""

    rollouts: RolloutBatch
    scores: Float32[Tensor, " batch"]
    metrics: dict[str, float] = field(default_factory=dict)
    """Of how it was collected; the same on every process."""

    def left_out(self, filter_groups: bool) -> Bool[Tensor, " batch"]:
        """Completions to mask: where groups are filtered, those that only fill the batch up.

        They are known by their equal scores, so a replay of dumped rollouts finds the same.
        """
        if filter_groups:
            return equal_groups(self.scores, self.rollouts.group_size)
        return torch.zeros(len(self.scores), dtype=torch.bool)

    @property
    def truncated(self) -> Bool[Tensor, " batch"]:
        """Completions that were cut off at the longest length."""
        return torch.tensor([rollout.is_truncated for rollout in self.rollouts.rollouts])


class ExperienceSource(Protocol):
    """Gives this replica's share of a step's global batch."""

    def collect(self, step: int, plan: LayerSkipPlan, timers: Timers) -> Experience:
        """The step's; every process calls it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on here."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...


class GeneratedExperience:
    """The nested policy completes the next prompts, and the judge scores them."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        tokenizer: Tokenizer,
        prompts: PromptSet,
        judge: Judge,
        *,
        interrupted: Callable[[], bool],
        check: Callable[[], None],
        data_metrics: Mapping[str, float],
    ) -> None:
        """`data_metrics` are figures of the prompts, for every step's record.

        `interrupted` is asked while a replica generates, by all of its processes together.

        `check` is called by every process after each generation, and after its judgement; it raises
        where the run stops.
        """
        self._interrupted = interrupted
        self._check = check
        self._config = config
        self._policy = policy
        self._decoder = PolicyDecoder(policy)
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._judge = judge
        self._engine = build_engine(config.rollout)
        longest = max(len(prompt.token_ids) for prompt in prompts.prompts)
        self._engine.check_room(self._decoder, policy.plan, longest + config.rollout.max_new_tokens)
        self._data_metrics = dict(data_metrics)
        stream = PromptStream(
            len(prompts),
            config.rollout.prompts_per_step,
            config.seed,
            parts=prompts.parts,
            fingerprint=prompts.fingerprint(),
        )
        self._selector = build_selector(config.data.selection, stream)

    def collect(self, step: int, plan: LayerSkipPlan, timers: Timers) -> Experience:
        """Generate and judge, again where `algorithm.filter_groups` wants other groups."""
        algorithm = self._config.algorithm
        generate = partial(self._generate, step, plan, timers)
        if algorithm.filter_groups:
            num_prompts = self._config.rollout.prompts_per_step
            rollouts, scores, metrics = sample_dynamically(
                generate, num_prompts, algorithm.max_refills, self._policy.context
            )
        else:
            (rollouts, scores), metrics = generate(0), {}
        return Experience(
            rollouts, scores, {**metrics, **self._data_metrics, **self._selector.metrics()}
        )

    def _generate(
        self, step: int, plan: LayerSkipPlan, timers: Timers, refill: int
    ) -> tuple[RolloutBatch, Tensor]:
        """This replica's share of the next prompts, under `plan` or drafted under it; and rewards.

        Prompts of later refills have later places in the step, so nothing is drawn twice.
        """
        data = self._policy.context.data
        indices = self._selector.next()
        batch = [self._prompts[index] for index in indices]
        share = shard_range(len(batch), data.rank, data.size)

        def interrupted() -> bool:
            fault_point("mid-rollout", step, self._policy.context.rank)
            return self._interrupted()

        draft_plan = None
        if self._config.rollout.mode == "speculative":
            plan, draft_plan = LayerSkipPlan.full(plan.num_layers), plan
        rollouts = None
        with timers("gen"), self._policy.nested(plan), suppress(GenerationInterrupted):
            rollouts = self._engine.generate(
                self._decoder,
                batch[share.start : share.stop],
                self._config.rollout.group_size,
                training_sampling(self._config, self._tokenizer, step),
                plan,
                draft_plan=draft_plan,
                first_prompt_index=refill * len(batch) + share.start,
                detokenize=self._tokenizer.decode,
                interrupted=interrupted,
            )
        # Replicas generate for different times: those that were not interrupted stop here.
        self._check()
        assert rollouts is not None, "generation is interrupted by requests to stop only"
        with timers("reward"):
            rewards = self._judge(rollouts)
        # Nobody learns from rewards that a dead pool has not given.
        self._check()
        if self._selector.learns:
            group_size = rollouts.group_size
            means = rewards.view(-1, group_size).mean(dim=1).tolist()
            everywhere = gather_from_replicas(means, self._policy.context)
            self._selector.observe(indices, [m for part in everywhere for m in part], group_size)
        return rollouts, rewards

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompt stream, and what is known of prompts."""
        return self._selector.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. UserError if it is of another data set, mixture or seed."""
        self._selector.load_state_dict(state)


class ReplayedExperience:
    """The rollouts and rewards that another run dumped; its plans are kept for the record."""

    def __init__(self, config: Config, policy: Policy) -> None:
        assert config.rollout.replay is not None, "replay needs rollout.replay"
        self._directory = Path(config.rollout.replay)
        self._prompts_per_step = config.rollout.prompts_per_step
        self._data = policy.context.data

    def collect(self, step: int, plan: LayerSkipPlan, timers: Timers) -> Experience:
        """Read this replica's share of the step. UserError if it is not there."""
        share = shard_range(self._prompts_per_step, self._data.rank, self._data.size)
        with timers("gen"):
            rollouts, rewards = load_rollouts(self._directory, step, share)
        return Experience(rollouts, torch.tensor(rewards, dtype=torch.float32))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says which files to read."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go back to."""
