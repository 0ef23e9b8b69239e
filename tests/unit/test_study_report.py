"""The table of a study, its speed-ups and intervals, and its plots."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path

import pytest
from study_cases import grid_in, write_run

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.studies.grid import Grid, StudyRun
from nested_reft_mcore.studies.plots import Plot, plots_of
from nested_reft_mcore.studies.report import write_report
from nested_reft_mcore.studies.results import RESULTS_FILE, Row, read_rows, row_of
from nested_reft_mcore.studies.student import estimate
from nested_reft_mcore.studies.table import PointRow, csv_text, markdown, table_of


def rows_of(grid: Grid) -> list[Row]:
    found = [row_of(run, 1000) for run in grid.runs]
    return [row for row in found if row is not None]


def seconds(run: StudyRun) -> float:
    """Of generation: full depth 1 s and skipping half of it, a tenth more with each seed."""
    whole = 2.0 if run.point.pp == 1 else 1.0
    return whole * (1 - run.point.skip_ratio) * (1 + 0.1 * run.point.seed * run.point.skip_ratio)


def entry(table: list[PointRow], ratio: float, pp: int = 1) -> PointRow:
    (found,) = (e for e in table if (e.point["skip_ratio"], e.point["pp"]) == (ratio, pp))
    return found


def test_a_row_leaves_the_first_step_out(tmp_path: Path) -> None:
    run = grid_in(tmp_path).runs[1]
    write_run(run, generation=2.0, evaluations={0: 0.25, 4: 0.5})
    row = row_of(run, 1000)
    assert row is not None
    # Its first step takes 5 times as long.
    assert row["medians"]["timing_s/gen"] == 2.0
    assert row["medians"]["perf/generated_tokens_per_second"] == 32.0
    assert (row["num_steps"], row["timed_steps"]) == (4, 3)
    assert (row["generated_tokens"], row["trained_tokens"]) == (64, 128)
    assert row["training_seconds"] == 11 + 3 * 3
    assert (row["num_skipped"], row["num_layers"], row["parameters"]) == (2, 8, 1000)
    assert row["point"]["law"] == "uniform"
    assert row["machine"]["processor"] == "A processor"
    # Policies that skip at evaluation are no part of it.
    assert [(e["step"], e["greedy"], e["seconds"]) for e in row["evaluations"]] == [
        (0, 0.25, 0),
        (4, 0.5, 20),
    ]


def test_speedups_are_against_the_same_seed_and_layout(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, skip_ratios=[0, 0.5], laws=["uniform"], seeds=[0, 1])
    for run in grid.runs:
        write_run(run, generation=seconds(run))
    table = table_of(rows_of(grid))
    half = entry(table, 0.5).estimates
    # 2 s against 1 s and 1.05 s; the rest of a step takes 1 s.
    assert half["generation_speedup"].mean == pytest.approx((2 / 1 + 2 / 1.05) / 2)
    assert half["step_speedup"].mean == pytest.approx((3 / 2 + 3 / 2.05) / 2)
    assert half["generation_speedup"].half == pytest.approx((2 - 2 / 1.05) / 2, rel=1e-4)
    assert entry(table, 0.5, pp=2).mean("generation_speedup") == pytest.approx((2 + 2 / 1.05) / 2)
    assert entry(table, 0.0).mean("generation_speedup") == 1
    assert half["generation_share"].mean == pytest.approx((1 / 2 + 1.05 / 2.05) / 2)


def test_intervals_begin_with_three_seeds() -> None:
    assert estimate([1.0]).half is None
    assert estimate([1.0, 4.0]).half == 1.5
    # Quantile of Student's t for two degrees of freedom, times the standard error.
    assert estimate([1.0, 2.0, 3.0]).half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_speedups_are_at_equal_tokens(tmp_path: Path) -> None:
    """A policy that stops early is no faster one."""
    grid = grid_in(tmp_path, skip_ratios=[0, 0.5], layouts=[{}])
    full, half = grid.runs
    write_run(full, generation=2.0)
    fewer = {"perf/generated_tokens": 32, "perf/generated_tokens_per_second": 32.0}
    write_run(half, generation=1.0, metrics=fewer)
    found = entry(table_of(rows_of(grid)), 0.5)
    assert found.mean("generation_speedup") == 1.0
    assert found.mean("step_speedup") == pytest.approx((32 / 2) / (64 / 3))


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    grid = grid_in(tmp_path)
    for run in grid.runs:
        write_run(run, generation=seconds(run))
    table = table_of(rows_of(grid))
    assert all(e.half is None for row in table for e in row.estimates.values())
    assert "±" not in markdown(table)
    (first, *_) = csv.DictReader(io.StringIO(csv_text(table)))
    assert (first["size"], first["tokens_per_second"], first["tokens_per_second_half"]) == (
        "tiny",
        "32",
        "",
    )
    assert "accuracy" not in markdown(table).splitlines()[0]


def plot(table: list[PointRow], name: str) -> Plot:
    (found,) = (p for p in plots_of(table) if p.name == name)
    return found


def test_strong_and_weak_scaling(tmp_path: Path) -> None:
    weak = {"dp": 2, "variant": "weak", "overrides": {"rollout.prompts_per_step": 8}}
    layouts = [{}, {"pp": 2}, {"dp": 2}, weak]
    grid = grid_in(tmp_path, skip_ratios=[0], layouts=layouts)
    # Steps of 1 + g seconds: PP 2 halves it, DP 2 does a little better.
    for run, generation, tokens in zip(
        grid.runs, (3.0, 1.0, 0.6, 4.0), (64, 64, 64, 128), strict=True
    ):
        write_run(run, generation=generation, metrics={"perf/generated_tokens": tokens})
    table = table_of(rows_of(grid))
    (strong,) = plot(table, "strong_scaling").panels["tiny"]
    assert strong.xs == [1, 2]
    assert [y.mean for y in strong.ys] == pytest.approx([1.0, 4 / 1.6])
    (line,) = plot(table, "weak_scaling").panels["tiny"]
    # Twice the tokens in 5 s instead of 4 s on two processes.
    assert [y.mean for y in line.ys] == pytest.approx([1.0, 4 / 5])


def test_accuracy_against_what_it_costs(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, layouts=[{"pp": 2}], laws=["uniform"], seeds=[0, 1])
    for run in grid.runs:
        last = 0.6 + 0.1 * run.point.seed - run.point.skip_ratio
        kl = {"rollout_corr/kl": run.point.skip_ratio}
        write_run(run, metrics=kl, evaluations={0: 0.1, 2: 0.2, 4: last})
    table = table_of(rows_of(grid))
    full, practical = plot(table, "accuracy_off_policyness").panels["tiny"]
    assert (full.label, practical.label) == ("full depth", "practical")
    assert (practical.xs[0], practical.ys[0].mean) == pytest.approx((0.25, 0.4))
    assert practical.ys[0].half == pytest.approx(0.05)
    series, _ = plot(table, "accuracy_wall_time").panels["tiny"]
    # Steps of 6, 2, 2, 2 seconds.
    assert series.xs == [0, 8, 12]
    assert [y.mean for y in series.ys] == pytest.approx([0.1, 0.2, 0.65])
    hours, _ = plot(table, "accuracy_gpu_hours").panels["tiny"]
    assert hours.xs == pytest.approx([0, 2 * 8 / 3600, 2 * 12 / 3600])


def test_a_report_of_half_a_study(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, laws=["uniform"], layouts=[{}, {"pp": 2}], seeds=[0, 1])
    one_stage = [run for run in grid.runs if run.point.pp == 1]
    for run in one_stage:
        write_run(run, generation=seconds(run))
    write_run(next(run for run in grid.runs if run.point.pp == 2), steps=1)
    output = tmp_path / "report"
    (output).mkdir()
    (output / "strong_scaling.png").write_bytes(b"of an earlier report")
    said = write_report(grid, output)
    assert said[-1] == f"4 of {len(grid.runs)} runs are finished"
    for name in ("tokens_per_second", "speedup", "step_speedup", "generation_share"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (output / "strong_scaling.png").exists()
    assert any(
        line.startswith("left out: strong_scaling.png: there are no finished runs of a size on two")
        for line in said
    )
    rows = read_rows(output / RESULTS_FILE)
    assert [row["name"] for row in rows] == [run.name for run in one_stage]
    assert json.dumps(rows[0])
    text = (output / "report.md").read_text()
    assert "- Machine: 2 cores of A processor, 8 GiB, native decoding kernels" in text
    assert "- Commit: 0123456789ab" in text
    assert "stopped at step 1 of 4" in text
    assert "- 3 runs are not started" in text
    assert "| 2 of 8 | uniform | practical | 2 |" in text


def test_a_report_names_runs_that_it_cannot_read(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, laws=["uniform"], layouts=[{}])
    full, half = grid.runs
    write_run(full)
    write_run(half)
    path = half.directory / "metrics.jsonl"
    path.write_text(path.read_text() + "garbage\n")
    said = write_report(grid)
    named = f"{half.name}: broken at step 4 of 4: {path}:5: cannot be read: Expecting value"
    assert any(line.startswith(f"left out: {named}") for line in said)
    assert said[-1] == "1 of 2 runs are finished"
    assert f"- {named}" in (grid.output / "report" / "report.md").read_text()
    (full.directory / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=rf"no run is finished, of 2(.|\n)*\n{full.name}: broken"):
        write_report(grid)


def test_seeds_differ_by_so_much(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, laws=["uniform"], layouts=[{}], seeds=[0, 1])
    for run in grid.runs:
        # 64 tokens in 1 s and 1.1 s; at full depth in 1 s and 1.2 s.
        more = 0.2 if run.point.skip_ratio == 0 else 0.1
        write_run(run, generation=1 + more * run.point.seed)
    said = write_report(grid)
    told = "The two seeds of a point differ in generated tokens/s by 15.0% (median of 2 points"
    assert any(line.startswith(told) for line in said)
    assert told in (grid.output / "report" / "report.md").read_text()


@pytest.mark.parametrize("inside", [True, False])
def test_the_command_of_a_report_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    folder = tmp_path / "a study"
    folder.mkdir()
    grid = grid_in(folder, laws=["uniform"], layouts=[{}])
    for run in grid.runs:
        write_run(run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path if inside else tmp_path / "elsewhere")
    output = tmp_path / "x" / "rep"
    write_report(grid, output)
    command = (output / "report.md").read_text().split("Made by `")[1].split("`")[0]
    words = shlex.split(command)
    assert words[:3] == ["python", "tools/scaling_study.py", "report"]
    assert (Path(words[3]).resolve(), Path(words[5]).resolve()) == (grid.path, output)
    assert Path(words[3]).is_absolute() != inside
