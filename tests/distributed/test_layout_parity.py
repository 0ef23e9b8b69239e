"""A nested model equals one that physically lacks the skipped layers, in every layout.

Losses, log-probs, entropies, gradient norms and every gradient are compared, tied and untied, with
recomputation off, uniform and block, for scattered layers, parts of layers and whole stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_worker import run_layout
from run_workers import run_workers

TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "reference.pt"
    run_workers(_write_reference, 1, path)
    return path


def _write_reference(ranks: Any, path: Path) -> None:
    run_layout(ranks, {}, path, write=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(2, {TP: 2}, id="tp2"),
        pytest.param(2, {PP: 2}, id="pp2"),
        pytest.param(2, {PP: 2, VPP: 2}, id="pp2-vpp2"),
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, {TP: 2, "sequence_parallel": True}, id="tp2-sp"),
        pytest.param(4, {TP: 2, PP: 2}, id="tp2-pp2"),
        pytest.param(4, {TP: 2, PP: 2, VPP: 2}, id="tp2-pp2-vpp2"),
        pytest.param(4, {PP: 4}, id="pp4"),
        pytest.param(4, {PP: 2}, id="pp2-dp2"),
    ],
)
def test_nested_equals_physically_smaller(
    reference: Path, world_size: int, options: dict[str, Any]
) -> None:
    run_workers(run_layout, world_size, options, reference)
