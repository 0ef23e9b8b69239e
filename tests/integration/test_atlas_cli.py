"""`nested-reft atlas` as a person runs it, and what its figures have to say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nested_reft_mcore
from nested_reft_mcore.cli.analysing import run_atlas
from nested_reft_mcore.config.errors import UserError

REPOSITORY = Path(nested_reft_mcore.__file__).parent.parent
SMALL = {
    "layers": 4,
    "skipped": "0,1,2",
    "plans": 2,
    "seeds": 2,
    "vocabulary": 3,
    "tokens": 4,
    "batch_sizes": "8,1024",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    """The output directory and what was printed, of a process of its own."""
    directory = tmp_path_factory.mktemp("atlas") / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = subprocess.run(
        [sys.executable, "-m", "nested_reft_mcore", "atlas", *options, "--output", str(directory)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


@pytest.fixture(scope="module")
def record(made) -> dict[str, Any]:
    return json.loads((made[0] / "atlas.json").read_text())


def points(record: dict[str, Any], table: str = "estimator") -> dict[tuple[str, int], Any]:
    return {
        (f"{p['name']} {p['section']}", p["num_skipped"]): p
        for p in record["points"]
        if p["table"] == table
    }


def test_it_prints_what_it_writes_and_draws_a_picture(made):
    directory, printed = made
    assert (directory / "atlas.md").read_text() in printed
    assert "Least mean squared error" in printed
    assert (directory / "atlas.png").read_bytes().startswith(b"\x89PNG")
    assert (directory / "atlas.png").stat().st_size > 20_000


def test_the_trajectory_is_the_one_correction_without_bias(record):
    found = points(record)
    corrections = {name for name, _ in found if name.endswith(" correction")}
    assert len(corrections) == 10
    for name in corrections:
        for k in (1, 2):
            point = found[name, k]
            if name == "trajectory correction":
                assert point["bias"] < 1e-6
                assert point["cosine"] == pytest.approx(1.0, abs=1e-9)
                continue
            assert point["bias"] > 1e-3, name
            assert 0 < point["cosine"] < 1
            # A bias does not go away in a large batch: the error ends there.
            assert point["squared_error"]["1024"] > point["bias"] ** 2
    # It pays in variance.
    for name in ("sequence", "retrace_cumulative"):
        cheaper = found[f"{name} correction", 2]["variance"]
        assert found["trajectory correction", 2]["variance"] > cheaper


def test_under_other_sampling_the_trajectory_is_right_where_its_ratio_knows_and_nothing_is_cut(
    record,
):
    found = {name: p for (name, k), p in points(record).items() if k == 2}
    rows = [name for name in found if name.endswith(" sampling")]
    assert len(rows) == 10 * 5
    for name in rows:
        is_right = name == "trajectory, temperature 0.8 sampling"
        assert (found[name]["bias"] < 1e-6) == is_right, name
    for correction in ("practical", "tis", "retrace_cumulative"):
        plain = found[f"{correction} correction"]
        cut = found[f"{correction}, top-p 0.9 sampling"]
        assert cut["bias"] != pytest.approx(plain["bias"], rel=1e-3)


def test_filtering_groups_scales_and_masking_truncated_completions_turns(record):
    batch, denominator = points(record, "batch"), points(record, "denominator")
    assert len(batch) == 24 * 3
    for size in (2, 3):
        plain = batch[f"trajectory rloo, {size} a group", 2]
        filtered = batch[f"trajectory rloo, {size} a group, filter_groups", 2]
        assert plain["bias"] < 1e-6 < 0.1 < filtered["bias"]
        assert filtered["cosine"] == pytest.approx(1.0, abs=1e-9)
        for method in ("grpo", "reinforce_plus_plus_baseline"):
            assert batch[f"trajectory {method}, {size} a group", 2]["bias"] > 1e-3
    masked = denominator["trajectory seq-mean-token-sum-norm, mask_truncated", 2]
    assert denominator["trajectory seq-mean-token-sum-norm", 2]["bias"] < 1e-6
    assert masked["bias"] > 0.05
    assert masked["cosine"] < 0.99


def test_with_nothing_skipped_all_that_samples_in_full_agrees(record):
    for (name, k), point in points(record).items():
        if k == 0 and not name.endswith((" sampling", " lambda")):
            assert point["bias"] < 1e-6, name
            assert point["variance"] == pytest.approx(
                points(record)["practical correction", 0]["variance"], rel=1e-9
            )
    first = record["distances"][0]
    assert (first["kl"], first["total_variation"]) == (0.0, 0.0)
    assert first["ess_sequence"] == pytest.approx(1.0)


def test_errors_are_bias_and_variance_and_fall_with_the_batch(record):
    for point in record["points"]:
        if point["table"] != "estimator":
            continue
        # Bias and variance are averaged as squares, so they add up in the averages too.
        for size, error in point["squared_error"].items():
            want = point["bias"] ** 2 + point["variance"] / int(size)
            assert error == pytest.approx(want, rel=1e-6)
            assert 0 <= point["scaled_error"][size] <= min(1.0, error) + 1e-9
        assert point["squared_error"]["8"] > point["squared_error"]["1024"]
        assert point["bias_of_mean"] <= point["bias"] * (1 + 1e-9) + 1e-7


def test_distances_grow_with_the_layers_skipped_and_pinsker_holds(record):
    kls = [d["kl"] for d in record["distances"]]
    assert 0.0 == kls[0] < kls[1] < kls[2]
    tokens = record["settings"]["space"]["max_length"]
    for distance in record["distances"]:
        assert distance["total_variation"] <= math.sqrt(tokens * distance["kl"] / 2) + 1e-12
        assert 0 < distance["ess_sequence"] <= distance["ess"] <= 1 + 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"skipped": "0,3"},
            "--skipped 0,3: 3 layers, but of 4 with --border-layers 1 .* at most 2",
        ),
        ({"layers": 1, "skipped": "0"}, "--layers 1: with --border-layers 1 at least 2 layers"),
        ({"skipped": "one"}, "--skipped one: expected whole numbers"),
        ({"batch_sizes": "0,8"}, "--batch-sizes 0,8: expected sizes from 1"),
        ({"vocabulary": 8, "tokens": 8}, "--vocabulary 8 --tokens 8: .* at most 4096"),
        ({"vocabulary": 2}, "vocabulary"),
        ({"output": "no/such/directory"}, "--output no/such/directory: its parent"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        run_atlas(SMALL | {"border_layers": 1, "output": None} | changes)


def test_an_output_that_is_a_file_is_not_overwritten(tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(UserError, match="is a file; expected a directory"):
        run_atlas(SMALL | {"border_layers": 1, "output": str(path)})
    assert path.read_text() == "mine"
