"""The supervised warm-up of `nested-reft sft`: imitation with optional layer dropout."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.demonstrations import (
    Demonstration,
    DemonstrationSet,
    collate,
    load_training_demonstrations,
)
from nested_reft_mcore.data.stream import PromptStream, shard_range
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.signals import StopSignals
from nested_reft_mcore.mcore.pipeline import broadcast_object, run_batch
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.training.dropout import warm_up_dropout
from nested_reft_mcore.training.replicas import add_up, gather_from_replicas
from nested_reft_mcore.training.run import Run


def warm_up(config: Config, context: ParallelContext, stop: StopSignals) -> int:
    """Learn from demonstrations; every process calls it. Returns the exit code.

    Each batch skips k layers, k drawn evenly from [min_skipped, max_skipped], so that the policy
    still works when a plan takes layers away.

    Raises:
        UserError: something that the config names is missing or broken.
        RuntimeError: too many updates in a row were not finite.
    """
    sft = config.sft
    run = Run(
        config, context, stop, command="sft", optimizer=sft.optimizer, num_steps=sft.num_steps
    )
    demonstrations = load_training_demonstrations(config.data, run.tokenizer)
    stream = PromptStream(
        len(demonstrations), sft.global_batch_size, config.seed, parts=demonstrations.parts
    )
    if run.state.step:
        stream.load_state_dict(run.state.data)
    return run.to_the_end(partial(_loop, run, demonstrations, stream))


def _loop(run: Run, demonstrations: DemonstrationSet, stream: PromptStream) -> int:
    """Imitate, record and save, step by step."""
    config, context, sft = run.config, run.context, run.config.sft
    share = shard_range(sft.global_batch_size, context.data.rank, context.data.size)
    for step in range(run.state.step, sft.num_steps):
        run.check()
        with run.timers("step"):
            plan = warm_up_dropout(config, run.policy, step)
            places = stream.next()[share.start : share.stop]
            batch = training_batch(
                [demonstrations[place] for place in places],
                run.tokenizer.pad_token_id,
                context.tensor.size,
            )
            metrics = _update(run, batch, plan)
        run.state.step, run.state.data = step + 1, stream.state_dict()
        run.check(may_stop=False)
        run.finish_step(metrics | demonstrations.metrics(), plan.describe(), every=sft.log_interval)
        if run.is_due(config.checkpoint.interval):
            run.save()
    return ExitCode.OK


def training_batch(
    demonstrations: list[Demonstration], pad_token_id: int, pad_to_multiple: int
) -> TrainingBatch:
    """Demonstrations as a batch whose mask is the demonstrated answer."""
    rows = collate(demonstrations, pad_token_id, pad_to_multiple)
    return TrainingBatch(
        tokens=rows.tokens,
        labels=rows.labels,
        position_ids=rows.position_ids,
        response_mask=rows.loss_mask,
        behavior_logprobs=torch.zeros(rows.tokens.shape),
        advantages=torch.ones(len(demonstrations)),
    )


def _update(run: Run, batch: TrainingBatch, plan: LayerSkipPlan) -> dict[str, float]:
    """One step of maximum likelihood under `plan`."""
    run.optimizer.zero_grad()
    with run.timers("update_actor"), run.policy.nested(plan):
        result = run_batch(
            run.policy,
            batch,
            _negative_log_likelihood,
            micro_batch_size=run.config.sft.micro_batch_size,
            temperature=1.0,
        )
    outcome = run.optimizer.step()
    run.state.count(outcome.applied, run.config.train.max_skipped_updates)
    local = {
        **add_up(result.outputs),
        "all_tokens": float(batch.tokens.numel()),
    }
    replicas = gather_from_replicas(broadcast_object(local, run.context), run.context)
    total = add_up(replicas)
    return {
        "sft/loss": total["loss"] / total["num_tokens"],
        "actor/grad_norm": outcome.grad_norm,
        "actor/lr": outcome.lr,
        "nested/num_skipped": float(plan.num_skipped),
        "perf/total_num_tokens": total["all_tokens"],
    }


def _negative_log_likelihood(
    logprobs: Tensor, _entropies: Tensor, batch: TrainingBatch
) -> tuple[Tensor, Tensor, dict[str, float]]:
    loss = -torch.where(batch.response_mask, logprobs, 0.0).sum()
    num_tokens = batch.response_mask.sum()
    return loss, num_tokens, {"loss": float(loss.detach()), "num_tokens": float(num_tokens)}
