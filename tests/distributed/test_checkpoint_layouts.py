"""A checkpoint saved in one layout continues in any other, optimizer state included."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_worker import load, save
from run_workers import run_workers

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
CASES = {
    "replicated": ("tied", {}),
    "distributed": ("tied", {"use_distributed_optimizer": True}),
    "distributed, qk norms": ("untied", {"use_distributed_optimizer": True}),
}
LAYOUTS = {"tp2": {TP: 2}, "pp2-vpp2": {PP: 2, VPP: 2}, "dp2": {}}


@pytest.mark.distributed
def test_continues_in_every_layout(tmp_path: Path) -> None:
    run_workers(save, 1, CASES, tmp_path)
    for differences in run_workers(load, 2, LAYOUTS, CASES, tmp_path):
        assert len(differences) == len(CASES) * len(LAYOUTS)
        # A step moves weights by about lr = 1e-2, a wrong moment or count shows at 1e-3. Single
        # weights whose gradient is rounding noise may differ by more: Adam scales noise up.
        assert max(differences.values()) < 1e-5, differences
