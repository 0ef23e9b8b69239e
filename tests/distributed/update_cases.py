"""Configurations, learners and rollouts for tests of updates, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from model_cases import VOCAB_SIZE, architecture

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    NestedConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.initialize import initialize_parallel
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.types import (
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutStats,
    SamplingParams,
)
from nested_reft_mcore.training.update import Learner

NUM_PROMPTS, GROUP_SIZE, TEMPERATURE = 8, 2, 0.7
ALGORITHMS = {
    "reinforce/base": AlgorithmConfig(objective="reinforce", rollout_is="base"),
    # Weights, rejections and denominators of whole sequences.
    "reinforce/sequences": AlgorithmConfig(
        objective="reinforce",
        rollout_is="geometric",
        rollout_rs="seq_mean_k1,token_k3",
        rollout_rs_threshold="3,2",
        loss_agg_mode="seq-mean-token-mean",
    ),
    # Bounds so narrow that the second update meets them.
    "ppo_clip/decoupled": AlgorithmConfig(
        objective="ppo_clip", rollout_is="retrace", clip_ratio_low=0.02, clip_ratio_high=0.02
    ),
}
MICRO_BATCHES = {
    "4 rows": {"micro_batch_size": 4},
    "2 rows": {"micro_batch_size": 2},
    # The longest sequence has 15.
    "40 tokens": {"max_tokens_per_micro_batch": 40, "logprob_chunk_tokens": 7},
}


@contextmanager
def layout(ranks: RankInfo, options: dict[str, Any]) -> Iterator[tuple[Any, ParallelContext]]:
    """Megatron's groups for one layout; the processes stay together for the next one."""
    parallel = ParallelConfig(**options)
    yield parallel, initialize_parallel(parallel, ranks, seed=0)
    parallel_state.destroy_model_parallel()


def configuration(
    algorithm: AlgorithmConfig = ALGORITHMS["reinforce/base"], micro_batches: str = "4 rows"
) -> Config:
    """What a Learner reads, and a law of plans."""
    return Config(
        run_dir="unused",
        model=ModelConfig(architecture=architecture()),
        nested=NestedConfig(num_skipped=3, law="uniform"),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        algorithm=algorithm,
        train=TrainConfig(**MICRO_BATCHES[micro_batches]),
    )


def learner_of(policy: Policy, optimizer: PolicyOptimizer, config: Config) -> Learner:
    return Learner(config, policy, optimizer, None, 0, Timers())


def given_rollouts(context: ParallelContext) -> tuple[RolloutBatch, torch.Tensor]:
    """This replica's share of rollouts that nobody sampled, and advantages of unlike sizes."""
    generator = torch.Generator().manual_seed(8)
    rollouts, advantages = [], []
    for number in range(NUM_PROMPTS * GROUP_SIZE):
        lengths = torch.randint(2, 9, (2,), generator=generator).tolist()
        prompt, response = (
            tuple(torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in lengths
        )
        # Around the log-prob of a uniform draw: ratios on both sides of 1.
        logprobs = -3.7 + 1.5 * torch.randn(lengths[1], generator=generator)
        place, sample = divmod(number, GROUP_SIZE)
        rollouts.append(
            Rollout(Prompt(prompt, ""), place, sample, response, tuple(logprobs.tolist()), "stop")
        )
        advantages.append(10.0 ** (number % 3 - 1) * (-1) ** number)
    share = shard_range(NUM_PROMPTS, context.data.rank, context.data.size)
    rows = slice(share.start * GROUP_SIZE, share.stop * GROUP_SIZE)
    batch = RolloutBatch(
        tuple(rollouts[rows]), GROUP_SIZE, LayerSkipPlan.full(8), RolloutStats(0, 0.0)
    )
    return batch, torch.tensor(advantages[rows])


def sampled_rollouts(
    policy: Policy, decoder: PolicyDecoder, plan: LayerSkipPlan, step: int = 0
) -> RolloutBatch:
    """This replica's share of what the policy samples under `plan`."""
    data = policy.context.data
    generator = torch.Generator().manual_seed(21)
    prompts = [
        Prompt(tuple(torch.randint(0, VOCAB_SIZE, (2 + n % 3,), generator=generator).tolist()), "")
        for n in range(NUM_PROMPTS)
    ]
    share = shard_range(NUM_PROMPTS, data.rank, data.size)
    sampling = SamplingParams(6, temperature=TEMPERATURE, stop_token_ids=(7,), seed=2, step=step)
    with policy.nested(plan):
        return RolloutEngine(6).generate(
            decoder,
            prompts[share.start : share.stop],
            GROUP_SIZE,
            sampling,
            plan,
            first_prompt_index=share.start,
        )
