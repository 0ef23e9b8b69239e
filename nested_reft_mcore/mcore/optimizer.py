"""Megatron's optimizer around the policy: one step, or a counted refusal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nested_reft_mcore.config.schema import OptimizerConfig
from nested_reft_mcore.mcore.model import Policy


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    applied: bool
    """False where the gradient was not finite and the weights stayed as they were."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate of the step."""


class PolicyOptimizer:
    """AdamW with its schedule; wraps the policy's chunks in Megatron's DistributedDataParallel."""

    def __init__(self, policy: Policy, config: OptimizerConfig, num_steps: int) -> None:
        self.config = config
        self._policy = policy
        config_of_model: Any = policy.transformer_config
        policy.ddp_chunks = [
            DistributedDataParallel(
                config_of_model,
                DistributedDataParallelConfig(
                    use_distributed_optimizer=config.use_distributed_optimizer,
                    overlap_grad_reduce=config.overlap_grad_reduce,
                    overlap_param_gather=config.overlap_param_gather,
                    grad_reduce_in_fp32=True,
                ),
                chunk,
            )
            for chunk in policy.chunks
        ]
        self.chunks = policy.ddp_chunks
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=config_of_model.bf16,
                params_dtype=config_of_model.params_dtype,
                use_distributed_optimizer=config.use_distributed_optimizer,
                overlap_param_gather=config.overlap_param_gather,
            ),
            self.chunks,
        )
        self.scheduler = _scheduler(self.megatron, config, num_steps)
        config_of_model.finalize_model_grads_func = finalize_model_grads
        config_of_model.grad_scale_func = self.megatron.scale_loss
        if config.overlap_grad_reduce:
            # Gradients are reduced while the last micro-batch runs backward, not before.
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config_of_model.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def zero_grad(self) -> None:
        """Clear gradients of the next update."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def step(self) -> StepOutcome:
        """Clip and apply the gradients, unless their norm is not finite; then advance the schedule.

        The schedule advances in either case, so that it depends on the step alone. RuntimeError
        while other weights are in the policy's place.
        """
        if self._policy.is_replaced:
            raise RuntimeError("an update while the reference is in the policy's place")
        lr = float(self.megatron.param_groups[0]["lr"]) if self.megatron.param_groups else 0.0
        found_inf = self.megatron.prepare_grads()
        norm = math.nan if found_inf else float(self.megatron.get_grad_norm())
        applied = math.isfinite(norm)
        if applied:
            self._clip(norm)
            applied = bool(self.megatron.step_with_ready_grads())
        self.scheduler.step(increment=1)
        return StepOutcome(applied, norm, lr)

    def make_state(self) -> None:
        """Make the moments that the first step would make, and let torch's AdamW count from 0.

        A checkpoint of a run without a step holds them, and is loaded into them. TE's and apex's
        Adam count steps elsewhere.
        """
        for part in self.parts:
            part.init_state_fn(part.optimizer)
            if isinstance(part.optimizer, torch.optim.AdamW):
                for state in part.optimizer.state.values():
                    state.setdefault("step", torch.tensor(0.0))

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint holds for `megatron`, but the options of this run's configuration.

        Megatron leaves a count of 0 steps out of a checkpoint, and torch's AdamW then misses it.
        """
        has_torch_adam = any(isinstance(part.optimizer, torch.optim.AdamW) for part in self.parts)
        if has_torch_adam and not self.config.use_distributed_optimizer:
            # With bfloat16 the inner optimizer's state is one level down.
            state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))
        names = ("max_lr", "min_lr", "betas", "eps")
        ours = [{name: group[name] for name in names} for group in self.megatron.param_groups]
        self.megatron.load_state_dict(state)
        for group, options in zip(self.megatron.param_groups, ours, strict=True):
            group.update(options)

    def _clip(self, norm: float) -> None:
        if self.config.clip_grad == 0:
            return
        for part in self.parts:
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(
                    parameters, max_norm=self.config.clip_grad, total_norm=norm
                )

    @property
    def parts(self) -> list[Any]:
        """The optimizers that Megatron has chained, those without parameters left out."""
        chained = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _scheduler(megatron: Any, config: OptimizerConfig, num_steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        # The schedule wants at least one step after the warm-up, even in a run of none.
        lr_decay_steps=max(num_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_steps,
        lr_wsd_decay_style="linear",
        # A resumed run follows its configuration, not that of the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
