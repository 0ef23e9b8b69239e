"""A checkpoint of TP2 x PP2 goes on at TP1, TP4 and PP4, where the padded vocabulary differs."""

from __future__ import annotations

from pathlib import Path

import pytest
from resharding_worker import reshard
from run_workers import run_workers

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CASES = {
    "replicated": {},
    "distributed": {"distributed": True},
    "distributed, untied": {"distributed": True, "untied": True},
}
LAYOUTS = {"tp4": {TP: 4}, "pp4": {PP: 4}, "dp4": {}}


@pytest.mark.slow
@pytest.mark.distributed
def test_goes_on_alike_at_every_layout(tmp_path: Path) -> None:
    courses = run_workers(reshard, 4, CASES, {TP: 2, PP: 2}, LAYOUTS, tmp_path)[0]
    for case in CASES:
        expected = courses[case].pop("origin")
        assert courses[case].keys() == LAYOUTS.keys()
        # Steps are long enough to see a moment that is missing: the losses move.
        losses = [loss for loss, _ in expected]
        assert losses[2] < losses[1] - 1 < losses[0] - 2
        for layout, found in courses[case].items():
            for step, other in zip(found, expected, strict=True):
                assert step == pytest.approx(other, rel=1e-5), (case, layout)
