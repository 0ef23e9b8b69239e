"""A nested model equals one that physically lacks the skipped layers, in every layout.

Losses, log-probs, entropies, gradient norms and every gradient are compared, tied and untied, with
recomputation off, uniform and block, for scattered layers, parts of layers and whole stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_worker import run_layouts
from run_workers import run_workers

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)


LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": {TP: 2},
        "pp2": {PP: 2},
        "pp2-vpp2": {PP: 2, VPP: 2},
        "dp2": {},
        "tp2-sp": {TP: 2, "sequence_parallel": True},
    },
    4: {
        "tp2-pp2": {TP: 2, PP: 2},
        "tp2-pp2-vpp2": {TP: 2, PP: 2, VPP: 2},
        "pp4": {PP: 4},
        "pp2-dp2": {PP: 2},
    },
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "reference.pt"
    run_workers(_write_reference, 1, path)
    return path


def _write_reference(ranks: Any, path: Path) -> None:
    run_layouts(ranks, {"single": {}}, path, write=True)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_nested_equals_physically_smaller(reference: Path, world_size: int) -> None:
    run_workers(run_layouts, world_size, LAYOUTS[world_size], reference)
