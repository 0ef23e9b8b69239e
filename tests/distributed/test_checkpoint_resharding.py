"""A checkpoint goes on at other layouts, where the vocabulary is padded to another length."""

from __future__ import annotations

from pathlib import Path

import pytest
from resharding_worker import reshard
from run_workers import run_workers

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
STAGED = {TP: 2, PP: 2}
LAYOUTS = {"tp4": {TP: 4}, "pp4": {PP: 4}, "tp1": {}}
CASES = {
    "replicated": {"origin": STAGED, "layouts": LAYOUTS},
    "distributed": {"origin": STAGED, "layouts": LAYOUTS, "distributed": True},
    "untied": {"origin": STAGED, "layouts": {"tp4": {TP: 4}}, "distributed": True, "untied": True},
    # From more rows than the other layouts have.
    "shrinking": {"origin": {TP: 4}, "layouts": {"tp2-pp2": STAGED}, "distributed": True},
}


@pytest.mark.slow
@pytest.mark.distributed
def test_goes_on_alike_at_every_layout(tmp_path: Path) -> None:
    courses = run_workers(reshard, 4, CASES, tmp_path)[0]
    for case, options in CASES.items():
        expected = courses[case].pop("origin")
        assert courses[case].keys() == options["layouts"].keys()
        # Steps are long enough to see a moment that is missing: the losses move.
        losses = [loss for loss, _ in expected]
        assert losses[1] < losses[0] - 1
        for layout, found in courses[case].items():
            for step, other in zip(found, expected, strict=True):
                assert step == pytest.approx(other, rel=1e-5), (case, layout)
