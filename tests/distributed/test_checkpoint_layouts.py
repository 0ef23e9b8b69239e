"""A checkpoint saved in one layout continues in any other, optimizer state included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_worker import load, save
from run_workers import run_workers

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
DISTRIBUTED = {"use_distributed_optimizer": True}


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [{}, DISTRIBUTED], ids=["replicated", "distributed"])
def test_continues_in_every_layout(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    run_workers(save, 1, {}, optimizer, tmp_path)
    for world_size, layout in ((2, {TP: 2}), (2, {PP: 2, VPP: 2}), (2, {})):
        differences = run_workers(load, world_size, layout, optimizer, tmp_path)
        # A step moves weights by about lr = 1e-2, a wrong moment or count shows at 1e-3. Single
        # weights whose gradient is rounding noise may differ by more: Adam scales noise up.
        assert max(differences) < 1e-5, (layout, differences)
