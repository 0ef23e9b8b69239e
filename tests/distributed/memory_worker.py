"""Processes that take real updates of a model of some size, and tell what memory it took."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.load import config_from_dict
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import named_parameters
from nested_reft_mcore.observability.timers import Timers
from nested_reft_mcore.rollout.types import Prompt, Rollout, RolloutBatch, RolloutStats
from nested_reft_mcore.training.update import Learner

_M_MMAP_THRESHOLD = -3
_UPDATES = 2
"""The first one makes the optimizer's moments when activations have gone already."""


def measure_update(ranks: RankInfo, options: dict[str, Any]) -> dict[str, int]:
    """Bytes of the tensors there are after two updates, and how far the process grew."""
    # Freed tensors go back to the system: what is resident is what is in use.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    config = config_from_dict(options)
    context = initialize_parallel(config.parallel, ranks, seed=0)
    # Code that is read from the disk when it first runs, and thread pools, are no part of a model.
    _take_updates(_small(config), context)
    gc.collect()
    libc.malloc_trim(0)
    before = _status("VmRSS")
    policy, optimizer, growth = _take_updates(config, context)
    growth -= before
    chunks = policy.ddp_chunks
    found = {
        "weights": _bytes(parameter for _, parameter in named_parameters(policy)),
        "gradients": _bytes(buffer.grad_data for chunk in chunks for buffer in chunk.buffers),
        "optimizer": _bytes(_state_tensors(optimizer)),
        "growth": growth,
        "stage": context.pipeline.rank,
    }
    shutdown()
    return found


def _shape(config: Config) -> Any:
    assert config.model.architecture is not None
    return config.model.architecture


def _small(config: Config) -> Config:
    """The same with tensors of no account."""
    widths = {"hidden_size": 64, "ffn_hidden_size": 64, "vocab_size": 64}
    shape = _shape(config).model_copy(update=widths)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"architecture": shape}),
            "data": config.data.model_copy(update={"max_prompt_length": 2}),
            "rollout": config.rollout.model_copy(update={"max_new_tokens": 3}),
        }
    )


def _take_updates(config: Config, context: ParallelContext) -> tuple[Policy, PolicyOptimizer, int]:
    """A policy and its optimizer after two updates; greatest resident bytes in the second."""
    policy = build_policy(_shape(config), config.model, config.parallel, context)
    for _, parameter in named_parameters(policy):
        torch.nn.init.constant_(parameter.data, 0.01)
    optimizer = PolicyOptimizer(policy, config.optimizer, num_steps=_UPDATES)
    learner = Learner(config, policy, optimizer, None, 0, Timers())
    batch = learner.training_batch(_rollouts(config, context))
    batch = batch.with_advantages(torch.linspace(-1, 1, len(batch)))
    for _ in range(_UPDATES):
        # The greatest resident size starts anew.
        Path("/proc/self/clear_refs").write_text("5")
        assert learner.update(batch).applied
    return policy, optimizer, _status("VmHWM")


def _rollouts(config: Config, context: ParallelContext) -> RolloutBatch:
    """This replica's share, all as long as the configuration allows."""
    prompt = (1,) * config.data.max_prompt_length
    response = (2,) * config.rollout.max_new_tokens
    share = config.rollout.prompts_per_step // context.data.size
    rollouts = [
        Rollout(Prompt(prompt, ""), place, sample, response, (-3.0,) * len(response), "stop")
        for place in range(share)
        for sample in range(config.rollout.group_size)
    ]
    plan = LayerSkipPlan.full(_shape(config).num_layers)
    return RolloutBatch(tuple(rollouts), config.rollout.group_size, plan, RolloutStats(0, 0.0))


def _state_tensors(optimizer: PolicyOptimizer) -> list[torch.Tensor]:
    """Moments and masters; those of a parameter in float32 are the parameter itself."""
    tensors = []
    for part in optimizer.parts:
        inner = part.optimizer
        for state in inner.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        masters = [p for group in inner.param_groups for p in group["params"]]
        if optimizer.megatron.config.bf16:
            tensors += masters
    return tensors


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")
