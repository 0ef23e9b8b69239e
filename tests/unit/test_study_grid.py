"""Which runs a study file makes, which are one run, and which mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_cases import SHAPE, grid_in, write_study

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.studies.commands import chosen
from nested_reft_mcore.studies.grid import make_grid
from nested_reft_mcore.studies.plan_table import plan_record, plan_text
from nested_reft_mcore.studies.prediction import cluster_of, predict
from nested_reft_mcore.studies.schema import load_study


def test_points_that_make_one_run_are_run_once(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, corrections=["practical", "retrace"], seeds=[0, 1])
    names = [run.name for run in grid.runs if run.point.seed == 0]
    assert names == [
        "tiny.skip_0.tp1_pp1_dp1.seed_0",
        # One stage: both laws are one.
        "tiny.skip_0.25.uniform.practical.tp1_pp1_dp1.seed_0",
        "tiny.skip_0.25.uniform.retrace.tp1_pp1_dp1.seed_0",
        "tiny.skip_0.tp1_pp2_dp1.seed_0",
        "tiny.skip_0.25.uniform.practical.tp1_pp2_dp1.seed_0",
        "tiny.skip_0.25.uniform.retrace.tp1_pp2_dp1.seed_0",
        "tiny.skip_0.25.stage_balanced.practical.tp1_pp2_dp1.seed_0",
        "tiny.skip_0.25.stage_balanced.retrace.tp1_pp2_dp1.seed_0",
    ]
    assert len(grid.runs) == 16
    assert grid.num_merged == 2 * (2 * 2 * 2 * 2 - 8)


def test_seeds_come_one_after_the_other(tmp_path: Path) -> None:
    sizes = {"a": {}, "b": {}}
    grid = grid_in(tmp_path, sizes=sizes, seeds=[3, 1], layouts=[{}], laws=["uniform"])
    order = [(run.point.seed, run.point.size, run.point.skip_ratio) for run in grid.runs]
    assert order == [(s, size, r) for s in (3, 1) for size in "ab" for r in (0, 0.25)]


def test_the_options_of_a_run(tmp_path: Path) -> None:
    size = {"overrides": {"optimizer.lr": 1e-4, "train.micro_batch_size": 1}}
    grid = grid_in(
        tmp_path,
        sizes={"tiny": size},
        overrides={"optimizer.lr": 1e-5, "logging.level": "warning"},
        corrections=["base"],
        layouts=[{"pp": 2, "overrides": {"train.micro_batch_size": 4}}],
    )
    run = grid.runs[-1]
    config = run.config
    assert (config.optimizer.lr, config.logging.level) == (1e-4, "warning")
    assert config.train.micro_batch_size == 4
    assert (config.nested.skip_ratio, config.nested.law) == (0.25, "stage_balanced")
    assert config.algorithm.rollout_is == "base"
    assert config.parallel.pipeline_model_parallel_size == 2
    assert config.parallel.data_parallel_size == 1
    assert config.run_dir == str(tmp_path / "runs" / run.name)
    assert run.config_path == tmp_path / "config.yaml"


def test_ratios_of_one_number_of_layers_are_one_run(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, skip_ratios=[0, 0.01, 0.24, 0.25], layouts=[{}])
    assert [run.point.skip_ratio for run in grid.runs] == [0, 0.24]


def test_excluded_points(tmp_path: Path) -> None:
    rules = [{"skip_ratio": 0.25, "pp": 2, "law": ["uniform"]}, {"pp": 1, "skip_ratio": 0.25}]
    grid = grid_in(tmp_path, exclude=rules)
    assert [(r.point.pp, r.point.law) for r in grid.runs] == [
        (1, None),
        (2, None),
        (2, "stage_balanced"),
    ]
    assert grid.num_excluded == 3


def test_a_layout_that_cannot_divide_is_struck_or_a_mistake(tmp_path: Path) -> None:
    layouts = [{"tp": 1}, {"pp": 3}]
    grid = grid_in(tmp_path, layouts=layouts, laws=["uniform"])
    assert [name for name, _ in grid.struck] == [
        "tiny.skip_0.tp1_pp3_dp1.seed_0",
        "tiny.skip_0.25.uniform.practical.tp1_pp3_dp1.seed_0",
    ]
    assert "does not divide the model's num_layers=8" in grid.struck[0][1]
    assert len(grid.runs) == 2
    with pytest.raises(UserError, match=r"tp1_pp3_dp1.*num_layers=8"):
        grid_in(tmp_path, layouts=layouts, on_misfit="error")


def test_a_ratio_that_leaves_too_few_layers_is_struck(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, skip_ratios=[0, 0.9], laws=["uniform"], layouts=[{}])
    ((name, reason),) = grid.struck
    assert name == "tiny.skip_0.9.uniform.practical.tp1_pp1_dp1.seed_0"
    assert "7 layers to skip" in reason
    assert len(grid.runs) == 1


def test_layouts_by_machines(tmp_path: Path) -> None:
    cluster = {"nodes": 2, "gpus_per_node": 4}
    grid = grid_in(tmp_path, layouts=[{"tp": 2, "nodes": 2}], cluster=cluster)
    assert {run.point.layout for run in grid.runs} == {"tp2_pp1_dp4"}
    with pytest.raises(UserError, match=r"tp=3 .* does not divide nodes=2 x"):
        grid_in(tmp_path, layouts=[{"tp": 3, "nodes": 2}], cluster=cluster)


def test_a_budget_makes_runs_equal(tmp_path: Path) -> None:
    layouts = [{"tp": 1}, {"dp": 2, "overrides": {"rollout.prompts_per_step": 8}}]
    grid = grid_in(tmp_path, equal="tokens", budget=640, layouts=layouts)
    assert {(r.point.dp, r.num_steps) for r in grid.runs} == {(1, 10), (2, 5)}
    assert {run.most_tokens for run in grid.runs} == {640}
    assert all("train.num_steps=" in " ".join(run.words) for run in grid.runs)
    with pytest.raises(UserError, match=r"budget: 700 tokens .* what would fit: 640 or 704"):
        grid_in(tmp_path, equal="tokens", budget=700, layouts=layouts[:1])
    with pytest.raises(UserError, match=r"makes 512 tokens and .* 256; set `budget`"):
        grid_in(tmp_path, equal="tokens", layouts=layouts)


def test_weak_scaling_needs_a_name_of_its_own(tmp_path: Path) -> None:
    more = {"dp": 2, "variant": "weak", "overrides": {"rollout.prompts_per_step": 8}}
    grid = grid_in(tmp_path, layouts=[{"dp": 2}, more])
    assert {run.point.layout for run in grid.runs} == {"tp1_pp1_dp2", "tp1_pp1_dp2_weak"}
    with pytest.raises(UserError, match="dp=2 is named twice"):
        grid_in(tmp_path, layouts=[{"dp": 2}, {**more, "variant": None}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_ratio": [0]}, "unknown key `skip_ratio`; did you mean `skip_ratios`"),
        ({"overrides": {"seed": 3}}, "seed is set by the grid; expected it in `seeds`"),
        ({"overrides": {"train.num_stepz": 3}}, "did you mean `train.num_steps`"),
        ({"exclude": [{"sise": "tiny"}]}, "`exclude` 1: expected some of size, skip_ratio"),
        ({"exclude": [{"size": "huge"}]}, "no size 'huge'; expected one of tiny"),
        ({"exclude": [{"size": "tiny"}]}, "`exclude` leaves out all"),
        ({"seeds": [1, 1]}, "`seeds`: 1 is named twice"),
        ({"sizes": {"a/b": {}}}, "String should match pattern|a/b"),
        ({"corrections": ["magic"]}, r"study\.yaml:\d+: `corrections\.0`: expected 'practical'"),
        ({"laws": ["magic"]}, r"^[^\n]*study\.yaml:\d+: `laws\.0`: expected 'uniform'[^\n]*$"),
        ({"layouts": [{"pp": 16}]}, "no run is left of the grid; such as tiny.skip_0.tp1_pp16"),
        ({"sizes": {"tiny": {"hf": "a", "checkpoint": "b"}}}, "hf and checkpoint are both set"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid_in(tmp_path, **changes)


def test_the_line_of_a_mistake_is_told(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    path.write_text("name: a\nbase: config.yaml\noutput: runs\nequal: tokens\nsizes: 3\n")
    with pytest.raises(UserError, match=r"study\.yaml:5: `sizes`"):
        load_study(path)


def test_a_study_may_extend_another(tmp_path: Path) -> None:
    write_study(tmp_path, overrides={"optimizer.lr": 1e-4, "logging.level": "warning"})
    path = tmp_path / "more.yaml"
    path.write_text(
        "extends: study.yaml\nname: more\nskip_ratios: [0.5]\noverrides: {optimizer.lr: 1.0e-3}\n"
    )
    study = load_study(path)
    assert (study.name, study.skip_ratios, study.base) == ("more", (0.5,), "config.yaml")
    assert study.overrides == {"optimizer.lr": 1e-3, "logging.level": "warning"}
    path.write_text("extends: ../study.yaml\n")
    with pytest.raises(UserError, match=r"more\.yaml:1: `extends`.*beside this one"):
        load_study(path)


def test_plan_predicts_and_strikes(tmp_path: Path) -> None:
    big = {**SHAPE, "hidden_size": 16384, "ffn_hidden_size": 65536, "num_layers": 16}
    sizes = {"tiny": {}, "huge": {"overrides": {"model.architecture": big}}}
    exclude = [{"size": "huge", "pp": [1, 4]}, {"size": "huge", "skip_ratio": 0.25}]
    layouts = [{}, {"pp": 2}, {"pp": 4}]
    grid = grid_in(tmp_path, sizes=sizes, layouts=layouts, exclude=exclude)
    cluster = cluster_of(grid.study.cluster, grid.path)
    predictions = predict(grid.runs, cluster)
    fitting = {run.point.layout for run in grid.runs if predictions[run.name].fits}
    assert fitting == {"tp1_pp1_dp1", "tp1_pp2_dp1"}
    assert not predictions["huge.skip_0.tp1_pp2_dp1.seed_0"].fits
    run = next(r for r in grid.runs if r.point.pp == 2 and r.point.size == "tiny")
    found = predictions[run.name]
    assert found.seconds == pytest.approx(4 * (found.step_seconds or 0))
    assert found.gpu_hours == pytest.approx(2 * (found.seconds or 0) / 3600)
    text = plan_text(grid, predictions, cluster)
    assert "STRUCK: update: stage 0 needs" in text
    assert "STRUCK: needs 4 GPUs; 1 x 2 are there" in text
    assert "skip_ratios has no 0" not in text
    record = plan_record(grid, predictions, cluster)
    assert len(record["runs"]) == len(grid.runs)
    more = cluster_of(grid.study.cluster, grid.path, nodes=2)
    assert predict(grid.runs, more)["tiny.skip_0.tp1_pp4_dp1.seed_0"].fits


def test_a_model_that_is_not_there_is_planned_by_the_shape_in_the_file(tmp_path: Path) -> None:
    sizes = {"tiny": {"hf": str(tmp_path / "nowhere")}}
    grid = grid_in(tmp_path, sizes=sizes, layouts=[{}])
    run = grid.runs[0]
    assert run.missing == str(tmp_path / "nowhere")
    assert run.architecture.num_layers == 8
    # What is run names the weights all the same.
    assert f'model.hf_path="{tmp_path / "nowhere"}"' in run.words
    assert "model.architecture=null" in run.words


def test_a_grid_without_full_depth_is_told(tmp_path: Path) -> None:
    grid = grid_in(tmp_path, skip_ratios=[0.25])
    cluster = cluster_of(grid.study.cluster, grid.path)
    assert "skip_ratios has no 0" in plan_text(grid, predict(grid.runs, cluster), cluster)


def test_data_that_is_not_there_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = grid_in(tmp_path)
    cluster = cluster_of(grid.study.cluster, grid.path)
    predictions = predict(grid.runs, cluster)
    assert len(grid.runs) > 1
    assert plan_text(grid, predictions, cluster).count("not found from here: train.jsonl") == 1
    (tmp_path / "train.jsonl").touch()
    assert "not found" not in plan_text(grid, predictions, cluster)


def test_only_by_parts_of_names(tmp_path: Path) -> None:
    grid = grid_in(tmp_path)
    assert {run.point.pp for run in chosen(grid, ["pp2"])} == {2}
    with pytest.raises(UserError, match=r"no run is called so; names are as tiny\.skip_0"):
        chosen(grid, ["pp3"])


def test_the_study_to_submit_fits_one_node() -> None:
    path = Path(__file__).parents[2] / "examples" / "scaling_qwen" / "study.yaml"
    grid = make_grid(load_study(path), path)
    assert len(grid.runs) == 2 * (1 + 3 * 3) * 3
    assert {run.point.world_size for run in grid.runs} == {8}
    predictions = predict(grid.runs, cluster_of(grid.study.cluster, path))
    assert all(prediction.fits for prediction in predictions.values())


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "math12k"])
def test_the_studies_of_one_set_train_on_it_alone(name: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "scaling_qwen" / f"study_{name}.yaml"
    study = load_study(path)
    assert [source["preset"] for source in study.overrides["data.train"]] == [name]
    assert len(study.overrides["data.eval"]) == 5
    assert study.output.endswith(name)


def test_the_study_on_cpus_has_what_it_promises() -> None:
    path = Path(__file__).parents[2] / "examples" / "scaling_cpu" / "study.yaml"
    grid = make_grid(load_study(path), path)
    first = [run for run in grid.runs if run.point.seed == 0]
    assert len(first) == 4 * (4 + 1 + 3 * 2)
    skipped = {(r.point.size, r.point.skip_ratio) for r in first}
    assert len(skipped) == 4 * 4
    assert all(run.config.rollout.ignore_eos and run.num_steps >= 5 for run in grid.runs)
