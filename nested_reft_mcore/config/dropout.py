"""What layer dropout, in the warm-up and in updates, asks of other options."""

from __future__ import annotations

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config, OptimizerConfig


def check_dropout(config: Config) -> None:
    """Refuse bounds that cross, and options that layer dropout makes wrong.

    Raises:
        UserError: names the options, what they say and what would fit.
    """
    sft = config.sft
    if sft.min_skipped > sft.max_skipped:
        raise UserError(
            f"sft.min_skipped={sft.min_skipped} is above sft.max_skipped={sft.max_skipped}"
        )
    _check_gradients("sft.max_skipped", sft.max_skipped, sft.optimizer, "sft.optimizer")
    dropped = config.train.max_dropped_layers
    _check_gradients("train.max_dropped_layers", dropped, config.optimizer, "optimizer")
    if dropped:
        _check_ratios(config)


def _check_gradients(key: str, most: int, optimizer: OptimizerConfig, section: str) -> None:
    if most and optimizer.overlap_grad_reduce:
        raise UserError(
            f"{key}={most} with {section}.overlap_grad_reduce=true: gradients of a dropped layer "
            "never become ready, so their reduction never starts; turn one of them off"
        )


def _check_ratios(config: Config) -> None:
    """Updates of a policy with layers left out: its ratios are not those of the full one."""
    key = f"train.max_dropped_layers={config.train.max_dropped_layers}"
    algorithm = config.algorithm
    if algorithm.objective != "reinforce" and not algorithm.bypass_mode:
        raise UserError(
            f"{key} with algorithm.objective={algorithm.objective}: the clipped ratio would "
            "compare a policy with layers left out with the full one of before; expected "
            "objective=reinforce, or bypass_mode=true"
        )
    if algorithm.kl_loss_coef:
        raise UserError(
            f"{key} with algorithm.kl_loss_coef={algorithm.kl_loss_coef:g}: the KL term would pull "
            "a policy with layers left out toward the full-depth reference; expected "
            "kl_loss_coef=0 (kl_reward_coef compares the full policy)"
        )
    if config.controller.metric != "none":
        raise UserError(
            f"{key} with controller.metric={config.controller.metric}: what updates leave out "
            "would be taken for what rollouts skip; expected controller.metric=none"
        )
    if config.diagnostics.split_every:
        raise UserError(
            f"{key} with diagnostics.split_every={config.diagnostics.split_every}: what updates "
            "leave out would be taken for staleness; set one of them to 0"
        )
