"""The simulated order of micro-batches against Megatron's own tables."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)

from nested_reft_mcore.simulation.pipeline_schedule import Work, stage_order


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("stages", "batches"), [(2, 4), (4, 4), (4, 12)])
@pytest.mark.parametrize("forward_only", [False, True])
def test_every_stage_does_what_megatron_lets_it_do(
    stages: int, batches: int, chunks: int, forward_only: bool
):
    table = get_schedule_table(batches, chunks, stages)
    for stage in range(stages):
        pipeline = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        total, _, warmup, remaining = get_pp_rank_microbatches(
            batches,
            chunks,
            stages,
            forward_only=forward_only,
            p2p_communicator=pipeline,  # pyright: ignore[reportArgumentType]
        )
        order = stage_order(stages, stage, batches, chunks, forward_only=forward_only)
        assert [work[1:] for work in order if work.kind == "F"] == table
        kinds = "".join(work.kind for work in order)
        if forward_only:
            assert kinds == "F" * total
            continue
        assert kinds == "F" * warmup + "FB" * remaining + "B" * warmup
        backwards = [Work("B", m, chunks - 1 - chunk) for m, chunk in table]
        assert [work for work in order if work.kind == "B"] == backwards
