"""Nested-ReFT (arXiv 2508.10123): the loop of `nested-reft train`."""

from __future__ import annotations

import logging
import math
from collections import Counter
from functools import partial

import torch.distributed as dist

from nested_reft_mcore.algorithm.diagnostics import NUM_NON_FINITE
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule, head_on_last_stage
from nested_reft_mcore.config.data import eval_sources
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.data.overlap import report_overlap
from nested_reft_mcore.data.prompts import load_training_prompts
from nested_reft_mcore.hf.config import check_exportable
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.faults import fault_point
from nested_reft_mcore.launch.signals import StopSignals
from nested_reft_mcore.mcore.hf_weights import export_hf_weights
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.training.advantages import replica_advantages, shaped_rewards
from nested_reft_mcore.training.dropout import update_dropout
from nested_reft_mcore.training.dumping import write_step, write_vocabulary
from nested_reft_mcore.training.evaluation import Evaluator
from nested_reft_mcore.training.experience import (
    ExperienceSource,
    GeneratedExperience,
    ReplayedExperience,
)
from nested_reft_mcore.training.judge import Judge
from nested_reft_mcore.training.metrics import LAYER_PASSES, rollout_metrics
from nested_reft_mcore.training.policy_setup import check_room, find_tokenizer
from nested_reft_mcore.training.ratio_split import RatioSplit, explain_engine_noise
from nested_reft_mcore.training.run import Run
from nested_reft_mcore.training.sensitivity_law import load_sensitivity_law
from nested_reft_mcore.training.steering import SkipSteering
from nested_reft_mcore.training.update import Learner, UpdateResult, metrics_of_step

_log = logging.getLogger(__name__)


def train(config: Config, context: ParallelContext, stop: StopSignals) -> int:
    """Train as `config` says; every process calls it. Returns the exit code.

    Raises:
        UserError: something that the config names is missing or broken.
        RuntimeError: too many updates in a row were not finite.
    """
    # First, for loading a model may take minutes: its functions may not be importable.
    with Judge(config.reward, context, keep_components=config.logging.dump_rollouts) as judge:
        run = Run(
            config,
            context,
            stop,
            command="train",
            optimizer=config.optimizer,
            num_steps=config.train.num_steps,
            updates_per_step=config.train.updates_per_step,
            keep_reference=config.algorithm.kl_loss_coef > 0 or config.algorithm.kl_reward_coef > 0,
        )
        if config.checkpoint.export_hf:
            check_exportable(run.policy.architecture)
        judge.on_dead = run.trouble.note
        return run.to_the_end(partial(_train, run, judge))


def _train(run: Run, judge: Judge) -> int:
    """Set up what the loop needs, run it, and export if that is asked for."""
    config = run.config

    def is_evaluation_interrupted() -> bool:
        fault_point("mid-evaluation", run.state.step, run.context.rank)
        return run.is_interrupted()

    evaluator = None
    if eval_sources(config.data) and config.evaluation.interval > 0:
        evaluator = Evaluator(
            config,
            run.tokenizer,
            run.policy,
            judge,
            interrupted=is_evaluation_interrupted,
            check=run.check,
            writing=run.trouble.writing,
        )
    experience = _experience_source(run, judge, evaluator)
    if run.state.step:
        experience.load_state_dict(run.state.data)
    if run.is_fresh and evaluator is not None and config.evaluation.before_training:
        run.state.owed = {}
    write_vocabulary(run)
    _loop(run, experience, evaluator, judge)
    if config.checkpoint.export_hf:
        run.check(may_stop=False)
        source = find_tokenizer(config.model, config.data.tokenizer_path)
        export_hf_weights(run.policy, run.directory / "hf", source, force=True)
    return ExitCode.OK


def _loop(
    run: Run, experience: ExperienceSource, evaluator: Evaluator | None, judge: Judge
) -> None:
    """Generate, judge, update, and whatever else is due, step by step."""
    config, timers, state = run.config, run.timers, run.state
    steering = SkipSteering(config.controller, skip_schedule(config, run.policy), state.controller)
    layer_passes: Counter[str] = Counter()
    learner = Learner(
        config, run.policy, run.optimizer, run.reference, run.tokenizer.pad_token_id, timers
    )
    if state.owed is not None:
        _conclude(run, evaluator, state.owed)
    first_step = state.step
    for step in range(first_step, config.train.num_steps):
        run.check()
        with timers("step"):
            plan = steering.plan(step)
            if config.nested.check_plan_across_ranks:
                check_plan_across_ranks(plan, run.context)
            collected = experience.collect(step, plan, timers)
            rollouts, scores = collected.rollouts, collected.scores
            batch = learner.training_batch(rollouts)
            rewards = shaped_rewards(scores, rollouts, batch, config)
            left_out = collected.left_out(config.algorithm.filter_groups)
            advantages = replica_advantages(
                rewards, left_out, config.algorithm.advantage, rollouts.group_size, run.context
            )
            batch = batch.with_advantages(advantages).without_responses(left_out)
            if config.algorithm.mask_truncated:
                # Not before: a completion that teaches nothing still pays for its KL in its group.
                batch = batch.without_responses(collected.truncated)
            metrics = rollout_metrics(rollouts, scores, rewards, run.context) | collected.metrics
            split = _split_ratio(run, learner, batch, rollouts.plan)
            updates = []
            for number, minibatch in enumerate(batch.deal(config.train.updates_per_step)):
                dropped = update_dropout(config, run.policy, step, number)
                updates.append(learner.update(minibatch, dropped))
                state.count(updates[-1].applied, config.train.max_skipped_updates)
                fault_point("mid-update", step, run.context.rank)
            if step == first_step:
                _check_engine_noise(run, rollouts.plan, updates[0])
            metrics |= metrics_of_step(updates) | judge.metrics()
            logprobs = [update.logprobs for update in updates]
            if split is not None:
                metrics |= split.metrics(logprobs, run.context)
        # The weights have changed: from here on the step is done, whoever asks to stop.
        run.check(may_stop=False)
        if config.logging.dump_rollouts:
            write_step(run, step, collected, batch, logprobs, judge.failures(), judge.components())
        metrics |= steering.learn(metrics)
        state.controller = steering.state_dict()
        state.step, state.data = step + 1, experience.state_dict()
        state.plan = rollouts.plan.describe()
        layer_passes.update({k: v for k, v in metrics.items() if k.startswith(LAYER_PASSES)})
        _conclude(run, evaluator, metrics)
    if layer_passes:
        _log.info("passes through a layer while generating: %s", _describe_passes(layer_passes))


def _conclude(run: Run, evaluator: Evaluator | None, metrics: dict[str, float]) -> None:
    """Evaluate, record and save what is due after a step, or before the first one.

    A request to stop that interrupts the evaluation leaves all of it to the resumed run.
    """
    config, step = run.config, run.state.step
    run.state.owed = metrics
    evaluation: dict[str, float] = {}
    if evaluator is not None and (step == 0 or run.is_due(config.evaluation.interval)):
        with run.timers("testing"):
            path = run.directory / "evaluation" / f"step_{step:06d}.jsonl"
            evaluation = evaluator(path).metrics
    run.state.owed = None
    if step == 0:
        run.log(metrics | evaluation)
        return
    run.finish_step(metrics | evaluation, run.state.plan)
    if run.is_due(config.checkpoint.interval):
        run.save()


def _split_ratio(
    run: Run, learner: Learner, batch: TrainingBatch, plan: LayerSkipPlan
) -> RatioSplit | None:
    """What `diagnostics.split_every` asks for, where it is due in the step under way."""
    every = run.config.diagnostics.split_every
    if every == 0 or run.state.step % every:
        return None
    with run.timers("diagnostics"):
        return RatioSplit.measure(learner.logprobs, run.policy, batch, plan)


def _check_engine_noise(run: Run, plan: LayerSkipPlan, first_update: UpdateResult) -> None:
    """Warn where rollouts that have to be on-policy are not."""
    k3_kl = first_update.metrics.get("rollout_corr/k3_kl", 0.0)
    if first_update.metrics.get(NUM_NON_FINITE, 0.0) > 0:
        # Such ratios are in no mean: it would tell of the others alone.
        k3_kl = math.inf
    config = run.config
    is_off_policy = plan.skipped or config.train.max_dropped_layers or config.rollout.replay
    if is_off_policy or not run.context.is_main:
        return
    trouble = explain_engine_noise(k3_kl, config.model.dtype)
    if trouble is not None:
        _log.warning("%s", trouble)


def skip_schedule(config: Config, policy: Policy) -> LayerSkipSchedule:
    """The plans of a run: a pure function of (seed, step), the same on every process."""
    num_layers = policy.architecture.num_layers
    is_full = config.rollout.mode == "full"
    measured = None
    if config.nested.law == "sensitivity" and not is_full:
        measured = load_sensitivity_law(config.nested, policy, config.rollout.temperature)
    return LayerSkipSchedule(
        law="uniform" if is_full else config.nested.law,
        num_layers=num_layers,
        num_skipped=0 if is_full else num_skipped(config.nested, num_layers),
        border_layers=config.nested.border_layers,
        part=config.nested.part,
        stage_of_layer=policy.stage_of_layer,
        seed=config.seed,
        stage_extra_cost=head_on_last_stage(config.nested.head_cost, policy.context.pipeline.size),
        protected_layers=config.nested.protected_layers,
        measured=measured,
    )


def check_plan_across_ranks(plan: LayerSkipPlan, context: ParallelContext) -> None:
    """Compare a hash of the plan over all processes. RuntimeError where one differs."""
    digests: list[str] = [""] * context.world_size
    dist.all_gather_object(digests, plan.digest())
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise RuntimeError(f"ranks {odd} drew another layer-skip plan than rank 0")


def _describe_passes(layer_passes: Counter[str]) -> str:
    """How many layer passes each pipeline rank ran while it decoded."""
    return ", ".join(
        f"{count:,.0f} on stage {name.rpartition('_')[2]}" for name, count in layer_passes.items()
    )


def _experience_source(run: Run, judge: Judge, evaluator: Evaluator | None) -> ExperienceSource:
    if run.config.rollout.replay is not None:
        return ReplayedExperience(run.config, run.policy)
    prompts = load_training_prompts(run.config.data, run.tokenizer)
    check_room(prompts.prompts, run.config.rollout.max_new_tokens, run.policy.architecture)
    held_out = () if evaluator is None else evaluator.prompts
    overlap = report_overlap(prompts.prompts, held_out)
    return GeneratedExperience(
        run.config,
        run.policy,
        run.tokenizer,
        prompts,
        judge,
        interrupted=run.is_interrupted,
        check=run.check,
        data_metrics=prompts.metrics() | overlap,
    )
