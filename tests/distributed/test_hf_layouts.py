"""Hugging Face weights in and out of every layout of real processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hf_cases import (
    CASES,
    CHECKPOINT_CASES,
    expected_logits,
    expected_logprobs,
    load_score_export,
    read_tensors,
    write_model,
)
from run_workers import run_workers

LAYOUTS = {
    2: {
        "tp2": {"tp": 2},
        "tp2-sp": {"tp": 2, "sp": 1},
        "pp2": {"pp": 2},
        "pp2-vpp2": {"pp": 2, "vpp": 2},
        "dp2": {},
    },
    4: {
        "tp4": {"tp": 4},
        "tp2-pp2": {"tp": 2, "pp": 2},
        "tp2-pp2-vpp2": {"tp": 2, "pp": 2, "vpp": 2},
    },
    8: {"tp4-pp2": {"tp": 4, "pp": 2}},
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8))]
)
def test_every_layout_scores_like_transformers_and_exports_the_same_bits(
    world_size: int, tmp_path: Path
):
    models = {str(case): write_model(case, tmp_path / "source" / str(case)) for case in CASES}
    logits = {str(case): expected_logits(models[str(case)], case) for case in CASES}
    logprobs = {str(case): expected_logprobs(models[str(case)], case) for case in CASES}
    layouts, source, target = LAYOUTS[world_size], tmp_path / "source", tmp_path / "target"
    with_logits = set()
    for scores in run_workers(load_score_export, world_size, layouts, source, target):
        assert len(scores) == len(layouts) * len(models)
        for key, (found, found_logits) in scores.items():
            name = key.split("/")[1]
            np.testing.assert_allclose(found, logprobs[name], rtol=0, atol=1e-5, err_msg=key)
            if found_logits is not None:
                with_logits.add(key)
                np.testing.assert_allclose(
                    found_logits, logits[name], rtol=0, atol=1e-5, err_msg=key
                )
    assert len(with_logits) == len(layouts) * len(models)
    for layout in layouts:
        for name in models:
            assert_same_tensors(source / name, target / layout / name)
        for case in CHECKPOINT_CASES:
            for way in ("converted", "saved"):
                assert_same_tensors(source / str(case), target / layout / f"{case}.{way}.hf")


def assert_same_tensors(one: Path, other: Path) -> None:
    expected, found = read_tensors(one), read_tensors(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), f"{other} {name}"
