"""What one option asks of another, checked before any process starts."""

from __future__ import annotations

from pathlib import Path

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.controller import check_controller
from nested_reft_mcore.config.corrections import read_correction, read_rejections
from nested_reft_mcore.config.data import check_data, data_paths, eval_sources, train_sources
from nested_reft_mcore.config.dropout import check_dropout
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.nested import check_nested, check_protected, num_skipped
from nested_reft_mcore.config.replay import check_replay, truncates
from nested_reft_mcore.config.rewards import check_reward, check_reward_files, evaluated_place
from nested_reft_mcore.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)


def check_config(config: Config) -> None:
    """Refuse options that contradict each other, as far as the file alone can tell.

    Raises:
        UserError: names the options, what they say and what would fit.
    """
    check_model(config.model)
    check_data(config.data)
    _check_parallel(config.parallel)
    for key, optimizer in (
        ("optimizer", config.optimizer),
        ("sft.optimizer", config.sft.optimizer),
    ):
        _check_optimizer(key, optimizer)
    check_nested(config)
    check_controller(config)
    check_reward(config.reward)
    evaluated_place(config.reward, config.evaluation.reward)
    check_dropout(config)
    _check_objective(config)
    _check_steps(config)
    if config.model.architecture is not None:
        check_depth(config, config.model.architecture.num_layers)


def check_for_training(config: Config) -> None:
    """Refuse what `train` cannot use though `generate` and `evaluate` can.

    Raises:
        UserError: top-k or top-p is set, there is nothing to train on, or the longest sequence
            that may come up is longer than a micro-batch.
    """
    for name in ("top_k", "top_p"):
        value = getattr(config.rollout, name)
        if truncates(name, value):
            raise UserError(
                f"rollout.{name}={value}: `train` samples from the full distribution. A truncated "
                "one leaves out tokens that the target policy gives mass to, and every importance "
                f"ratio would be off by the kept mass. Leave rollout.{name} out; evaluation.{name} "
                "and `generate` may truncate."
            )
    if not train_sources(config.data) and config.rollout.replay is None:
        raise UserError(
            "data.train_path is missing: `train` needs prompts (or data.train, or rollout.replay)"
        )
    _check_micro_batch_tokens(config)
    replay = config.rollout.replay
    if replay is not None and Path(replay).exists():
        check_replay(Path(replay) / "config.yaml", config.rollout.temperature)


def check_for_warm_up(config: Config) -> None:
    """Refuse what `sft` cannot use.

    Raises:
        UserError: there are no demonstrations to learn from.
    """
    if not train_sources(config.data):
        raise UserError("data.train_path is missing: `sft` needs demonstrations")


def check_for_evaluation(config: Config) -> None:
    """Refuse what `evaluate` cannot use.

    Raises:
        UserError: there are no prompts to evaluate on.
    """
    if not eval_sources(config.data):
        raise UserError("data.eval_path is missing: `evaluate` needs held-out prompts")


def check_paths(config: Config, *, trains: bool = True) -> None:
    """Refuse input files and directories that are not there.

    What only training reads is not looked at unless the command `trains`.

    Raises:
        UserError: names the option, the path, and where relative paths start.
    """
    paths = {
        **dict(data_paths(config.data)),
        "rollout.replay": config.rollout.replay,
        "nested.sensitivity_path": config.nested.sensitivity_path,
    }
    for key, path in paths.items():
        if not trains and key.startswith(("data.train", "rollout.", "nested.")):
            continue
        if path is not None and not Path(path).exists():
            raise UserError(f"{key}: {path} does not exist (taken from {Path.cwd()})")
    check_reward_files(config.reward)


def check_model(model: ModelConfig) -> None:
    """Refuse a model with no origin or two, impossible shapes, and half-set recomputation.

    Raises:
        UserError: names the options and what they say.
    """
    origins = [
        name
        for name in ("hf_path", "checkpoint", "architecture")
        if getattr(model, name) is not None
    ]
    if len(origins) != 1:
        found = " and ".join(f"model.{name}" for name in origins) or "none of them"
        raise UserError(
            f"model: expected exactly one of hf_path, checkpoint and architecture; found {found}"
        )
    if model.architecture is not None:
        check_architecture(model.architecture, "model.architecture")
    _check_recomputation(model)


def check_architecture(architecture: ModelArchitecture, source: str) -> None:
    """Refuse shapes that no transformer has; `source` starts the message.

    Raises:
        UserError: heads that groups or the hidden size don't fit.
    """
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    if heads % groups:
        raise UserError(
            f"{source}: num_query_groups={groups} does not divide num_attention_heads={heads}; "
            f"what would fit: {_list(_divisors(heads))}"
        )
    if architecture.kv_channels is None and architecture.hidden_size % heads:
        raise UserError(
            f"{source}: num_attention_heads={heads} does not divide "
            f"hidden_size={architecture.hidden_size}; set kv_channels, the size of one head"
        )
    if architecture.head_dim % 2:
        raise UserError(
            f"{source}: the size of one head is {architecture.head_dim}; "
            "rotary embeddings need an even one"
        )


def check_depth(config: Config, num_layers: int) -> None:
    """Refuse to skip more layers than a model of `num_layers` has between its borders.

    Raises:
        UserError: names the option, the number asked for and the number there is.
    """
    nested = config.nested
    check_protected(nested, num_layers)
    count, protected = num_skipped(nested, num_layers), nested.protected_layers
    _check_skippable("nested", count, num_layers, nested.border_layers, protected)
    _check_skippable("sft", config.sft.max_skipped, num_layers, config.sft.border_layers)
    controller = config.controller
    most = max(controller.min_skipped, controller.max_skipped or 0)
    _check_skippable("controller", most, num_layers, nested.border_layers, protected, "nested")
    key, dropped = "train.max_dropped_layers", config.train.max_dropped_layers
    _check_skippable(key, dropped, num_layers, nested.border_layers, protected, "nested")


def check_batches(config: Config, data_parallel_size: int) -> None:
    """Refuse batches that the data-parallel replicas cannot share evenly. For `train`.

    Raises:
        UserError: names the option and the values that would fit.
    """
    prompts = config.rollout.prompts_per_step
    if prompts % data_parallel_size:
        fitting = _list(_near_multiples(prompts, data_parallel_size))
        raise UserError(
            f"rollout.prompts_per_step={prompts} is not a multiple of the data-parallel size "
            f"{data_parallel_size}; what would fit: {fitting}"
        )
    updates = config.train.updates_per_step
    per_replica = prompts // data_parallel_size * config.rollout.group_size
    if per_replica % updates:
        raise UserError(
            f"train.updates_per_step={updates} does not divide the {per_replica} completions of a "
            "data-parallel replica (rollout.prompts_per_step * rollout.group_size / "
            f"{data_parallel_size}); what would fit: {_list(_divisors(per_replica))}"
        )


def check_warm_up_batches(config: Config, data_parallel_size: int) -> None:
    """Refuse a warm-up batch that micro-batches and replicas cannot share evenly. For `sft`.

    Raises:
        UserError: names the options and the values that would fit.
    """
    sft = config.sft
    unit = sft.micro_batch_size * data_parallel_size
    if sft.global_batch_size % unit:
        fitting = _list(_near_multiples(sft.global_batch_size, unit))
        raise UserError(
            f"sft.global_batch_size={sft.global_batch_size} is not a multiple of "
            f"sft.micro_batch_size={sft.micro_batch_size} times the data-parallel size "
            f"{data_parallel_size}; what would fit: {fitting}"
        )


def _check_skippable(
    section: str,
    count: int,
    num_layers: int,
    border: int,
    protected: tuple[int, ...] = (),
    owner: str | None = None,
) -> None:
    """`owner` is the section of `border_layers`, if it is another."""
    owner = owner or section
    inner = range(border, num_layers - border)
    between = len(set(inner) - set(protected))
    if count > between:
        protecting = f" and {owner}.protected_layers={list(protected)}" if protected else ""
        raise UserError(
            f"{section}: {count} layers to skip, but {num_layers} layers with "
            f"{owner}.border_layers={border}{protecting} leave {between} that may be skipped"
        )


def _check_parallel(parallel: ParallelConfig) -> None:
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1"
        )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and parallel.pipeline_model_parallel_size == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={virtual} needs "
            "parallel.pipeline_model_parallel_size above 1"
        )


def _check_optimizer(key: str, optimizer: OptimizerConfig) -> None:
    if optimizer.overlap_param_gather:
        missing = [
            f"{key}.{name}=true"
            for name in ("use_distributed_optimizer", "overlap_grad_reduce")
            if not getattr(optimizer, name)
        ]
        if missing:
            raise UserError(f"{key}.overlap_param_gather=true needs {' and '.join(missing)}")
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"{key}.min_lr={optimizer.min_lr} is above {key}.lr={optimizer.lr}")
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_steps is None:
        raise UserError(
            f"{key}.lr_decay_style=WSD needs {key}.lr_wsd_decay_steps, the length of its decay"
        )


def _check_objective(config: Config) -> None:
    algorithm = config.algorithm
    read_correction(algorithm)
    read_rejections(algorithm)
    if algorithm.bypass_mode and algorithm.objective == "reinforce":
        raise UserError(
            "algorithm.bypass_mode=true chooses the ratio of algorithm.objective=ppo_clip, cispo "
            "or gspo; found objective=reinforce"
        )
    if algorithm.bypass_mode and algorithm.rollout_is != "practical":
        raise UserError(
            "algorithm.bypass_mode=true already has target / behavior as its ratio, so "
            f"algorithm.rollout_is={algorithm.rollout_is} would count it twice; expected "
            "rollout_is=practical, or bypass_mode=false"
        )
    if algorithm.clip_ratio_c is not None and algorithm.objective != "ppo_clip":
        raise UserError(
            f"algorithm.clip_ratio_c={algorithm.clip_ratio_c} is the dual clip of "
            f"algorithm.objective=ppo_clip; found objective={algorithm.objective}"
        )
    if algorithm.kl_corrected and not algorithm.kl_loss_coef:
        raise UserError(
            "algorithm.kl_corrected=true weighs a KL term that is not there; set "
            "algorithm.kl_loss_coef above 0"
        )
    if algorithm.kl_corrected and algorithm.kl_reward_coef:
        raise UserError(
            "algorithm.kl_corrected=true: a KL in the reward has no corrected form; found "
            f"algorithm.kl_reward_coef={algorithm.kl_reward_coef:g}, expected kl_loss_coef alone"
        )
    if algorithm.retrace_lambda != 1 and not algorithm.rollout_is.startswith("retrace"):
        raise UserError(
            f"algorithm.retrace_lambda={algorithm.retrace_lambda:g} belongs to "
            f"algorithm.rollout_is=retrace; found rollout_is={algorithm.rollout_is}"
        )
    if config.reward.overlong_buffer_len > config.rollout.max_new_tokens:
        raise UserError(
            f"reward.overlong_buffer_len={config.reward.overlong_buffer_len} is longer than "
            f"rollout.max_new_tokens={config.rollout.max_new_tokens}"
        )


def _check_micro_batch_tokens(config: Config) -> None:
    budget = config.train.max_tokens_per_micro_batch
    # Of a sequence all tokens but the last go into the model.
    longest = config.data.max_prompt_length + config.rollout.max_new_tokens - 1
    if config.parallel.sequence_parallel:
        size = config.parallel.tensor_model_parallel_size
        longest = -(-longest // size) * size
    if budget is not None and budget < longest:
        raise UserError(
            f"train.max_tokens_per_micro_batch={budget} has no room for the longest sequence that "
            f"may come up, {longest} tokens (data.max_prompt_length="
            f"{config.data.max_prompt_length} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens}); expected at least {longest}"
        )


def _check_steps(config: Config) -> None:
    if config.algorithm.filter_groups and config.rollout.group_size == 1:
        raise UserError(
            "algorithm.filter_groups=true with rollout.group_size=1: a group of one has equal "
            "rewards always, and all would be dropped; expected a group_size of 2 or more"
        )
    total = config.rollout.prompts_per_step * config.rollout.group_size
    updates = config.train.updates_per_step
    if total % updates:
        raise UserError(
            f"train.updates_per_step={updates} does not divide the {total} completions of a step "
            "(rollout.prompts_per_step * rollout.group_size); "
            f"what would fit: {_list(_divisors(total))}"
        )


def _check_recomputation(model: ModelConfig) -> None:
    method, layers = model.recompute_method, model.recompute_num_layers
    if model.recompute_granularity == "full":
        missing = [
            name
            for name, value in (("recompute_method", method), ("recompute_num_layers", layers))
            if value is None
        ]
        if missing:
            raise UserError(
                "model.recompute_granularity=full needs "
                + " and ".join(f"model.{name}" for name in missing)
            )
    elif method is not None or layers is not None:
        found = "model.recompute_method" if method is not None else "model.recompute_num_layers"
        raise UserError(f"{found} is set, but only model.recompute_granularity=full uses it")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _near_multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` on either side of `number`."""
    below = number // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def _list(numbers: list[int]) -> str:
    """Numbers for a message; long lists lose their middle."""
    if len(numbers) > 12:
        return f"{', '.join(map(str, numbers[:8]))}, ..., {', '.join(map(str, numbers[-3:]))}"
    return ", ".join(map(str, numbers))
