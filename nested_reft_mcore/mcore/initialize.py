"""Process groups: from what the launcher said to a ParallelContext."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, ParallelDimension, RankInfo
from nested_reft_mcore.launch.lifeline import Lifeline
from nested_reft_mcore.mcore import cpu_backend


def initialize_parallel(
    parallel: ParallelConfig,
    ranks: RankInfo,
    seed: int,
    *,
    store: dist.Store | None = None,  # pyright: ignore[reportPrivateImportUsage]
    lifeline: Lifeline | None = None,
) -> ParallelContext:
    """Join the other processes and build Megatron's groups.

    Args:
        parallel: Sizes; they must multiply to a divisor of `ranks.world_size`.
        ranks: This process, as its launcher numbers it.
        seed: Seeds Megatron's random state, which only dropout would use.
        store: Where the processes have met; left out: they meet at the launcher's address.
        lifeline: This process's, for the context to hold.

    Returns:
        The context that everything else receives.
    """
    cpu_backend.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    elif ranks.world_size > 1:
        # More threads than cores make processes that wait for each other spin for minutes.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not dist.is_initialized():
        _join_process_group(ranks, device, parallel.timeout_minutes, store)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # Each group has a timeout of its own, and Megatron's would be half an hour.
        distributed_timeout_minutes=parallel.timeout_minutes,  # pyright: ignore[reportArgumentType]
    )
    model_parallel_cuda_manual_seed(seed)
    return ParallelContext(
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_rank=ranks.local_rank,
        device=device,
        tensor=_dimension(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_dimension(parallel_state.get_pipeline_model_parallel_group()),
        data=_dimension(parallel_state.get_data_parallel_group()),
        num_chunks=parallel.virtual_pipeline_model_parallel_size or 1,
        local_world_size=ranks.local_world_size,
        lifeline=lifeline or Lifeline(),
    )


def _join_process_group(
    ranks: RankInfo,
    device: torch.device,
    timeout_minutes: float,
    store: dist.Store | None,  # pyright: ignore[reportPrivateImportUsage]
) -> None:
    """Make the default group, in the store where the processes have met if there is one."""
    has_cuda = device.type == "cuda"
    if has_cuda:
        # Both are torch's own defaults of late. A collective that fails, or is late by the timeout,
        # then ends this process, which would otherwise wait in the next one for ever.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "1")
    init_method = None
    if ranks.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    else:
        os.environ["MASTER_ADDR"] = ranks.master_addr
        os.environ["MASTER_PORT"] = str(ranks.master_port)
        # "env://" joins torchrun's own store where torchrun started this process.
        init_method = "env://" if store is None else None
    dist.init_process_group(
        backend="nccl" if has_cuda else "gloo",
        init_method=init_method,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        device_id=device if has_cuda else None,
    )


def shutdown() -> None:
    """Leave every process group."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _dimension(group: Any) -> ParallelDimension:
    size = dist.get_world_size(group)
    return ParallelDimension(
        rank=dist.get_rank(group),
        size=size,
        ranks=tuple(dist.get_process_group_ranks(group)),
        group=group if size > 1 else None,
    )
