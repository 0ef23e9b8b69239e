"""What the skip controller asks of its own options and of others."""

from __future__ import annotations

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config


def check_controller(config: Config) -> None:
    """Refuse bounds that cross, a target that is missing or no target, and rollouts to steer none.

    Raises:
        UserError: names the options, what they say and what would fit.
    """
    controller = config.controller
    if controller.max_skipped is not None and controller.min_skipped > controller.max_skipped:
        raise UserError(
            f"controller.min_skipped={controller.min_skipped} is above "
            f"controller.max_skipped={controller.max_skipped}"
        )
    if controller.patience > controller.max_wait:
        raise UserError(
            f"controller.patience={controller.patience} is above "
            f"controller.max_wait={controller.max_wait}: a wait is at least one window"
        )
    if controller.metric == "none":
        if controller.target is not None:
            raise UserError(
                f"controller.target={controller.target} is set, but controller.metric=none steers "
                "nothing; choose ess, ess_seq, kl or ratio_p05"
            )
        return
    if controller.target is None:
        raise UserError(
            f"controller.metric={controller.metric} needs controller.target, the worst value that "
            "is kept"
        )
    if controller.metric != "kl" and controller.target >= 1:
        raise UserError(
            f"controller.target={controller.target}: {controller.metric} is a share, 1 on-policy; "
            "expected a number between 0 and 1"
        )
    if config.rollout.mode != "nested":
        raise UserError(
            f"controller.metric={controller.metric} with rollout.mode={config.rollout.mode}: those "
            "rollouts are on-policy whatever is skipped; expected rollout.mode=nested"
        )
    if config.rollout.replay is not None:
        raise UserError(
            f"controller.metric={controller.metric} with rollout.replay: what was skipped is given "
            "by the replayed run; expected controller.metric=none"
        )
