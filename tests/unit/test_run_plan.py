"""Plans of the example configurations: verdict, advice, times, gains, mistakes, command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nested_reft_mcore
from nested_reft_mcore.cli import app
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.planning.advice import changed
from nested_reft_mcore.planning.hardware import BUILT_IN, load_hardware
from nested_reft_mcore.planning.report import plan_report
from nested_reft_mcore.planning.run_plan import make_plan

EXAMPLES = Path(nested_reft_mcore.__file__).parents[1] / "examples"
NODES = {"qwen2.5_math_1.5b": 1, "qwen2.5_math_7b": 1, "qwen2.5_32b": 2, "llama3.1_70b": 4}


def example(name: str) -> Path:
    return EXAMPLES / name / "config.yaml"


def plan(name: str, *overrides: str, nodes: int = 1, memory: float = 80, hardware: str = "h100"):
    return make_plan(load_config(example(name), overrides), nodes, 8, memory, hardware)


@pytest.mark.parametrize("name", NODES)
def test_every_example_fits_on_80_gb_with_more_nodes_too(name: str):
    for factor in (1, 2):
        made = plan(name, nodes=NODES[name] * factor)
        assert made.fits, plan_report(made)
        assert made.layout.data == made.layout.world_size // (
            made.layout.tensor * made.layout.pipeline
        )
        assert "FITS" in plan_report(made)


def test_the_70b_needs_its_four_nodes():
    smaller = plan("llama3.1_70b", "parallel.pipeline_model_parallel_size=2", nodes=2)
    assert not smaller.fits
    assert "DOES NOT FIT" in plan_report(smaller)


def test_advice_fits_when_it_is_followed():
    made = plan(
        "qwen2.5_math_7b",
        "parallel.tensor_model_parallel_size=2",
        "optimizer.use_distributed_optimizer=false",
        "optimizer.overlap_param_gather=false",
    )
    assert not made.fits
    assert made.advice
    for advice in made.advice:
        assert advice.fits
        other = changed(made.config, advice.change)
        again = make_plan(other, advice.change.nodes or 1, 8, 80)
        assert again.fits
        assert again.worst.peak[1] == advice.worst_bytes
        assert str(advice.change) in plan_report(made)
    keys = [key for advice in made.advice for key in advice.change.keys]
    assert "optimizer.use_distributed_optimizer" in keys


def test_where_nothing_helps_the_closest_is_shown():
    made = plan("llama3.1_70b", nodes=4, memory=8)
    assert len(made.advice) == 1
    assert not made.advice[0].fits
    assert made.advice[0].worst_bytes < made.worst.peak[1]
    assert "closest" in plan_report(made)


def test_a_cache_too_small_for_one_sequence_does_not_fit():
    made = plan("qwen2.5_math_7b", "rollout.kv_cache_gb=0.01")
    assert [text for text in made.problems if "kv_cache_gb" in text]
    assert any("rollout.kv_cache_gb" in advice.change.keys for advice in made.advice)


def test_a_nodes_host_memory_is_checked_where_it_is_known():
    profile = BUILT_IN["h100"].model_copy(update={"host_memory_gb": 200.0})
    made = make_plan(load_config(example("qwen2.5_math_7b")), 1, 8, 80, profile)
    assert [text for text in made.problems if text.startswith("host memory")]


def test_parts_of_a_step_add_up_and_better_machines_are_faster():
    times = [plan("qwen2.5_32b", nodes=2, hardware=name).time for name in BUILT_IN]
    for time in times:
        assert time.total == time.generation + time.logprobs + time.update + time.rest
        assert time.tokens_per_second == time.tokens / time.total / 16
        assert 0 < time.bubble < 0.5
    assert times[0].total > times[1].total > times[2].total
    # An H200 differs from an H100 in memory alone.
    assert times[1].logprobs == times[2].logprobs


def test_the_bubble_is_that_of_the_schedule():
    made = plan("llama3.1_70b", "train.max_tokens_per_micro_batch=null", nodes=4)
    # 128 * 8 completions in two updates of micro-batches of 8, through 4 stages.
    assert made.time.bubble == pytest.approx(3 / (64 + 3))
    virtual = plan(
        "llama3.1_70b",
        "train.max_tokens_per_micro_batch=null",
        "parallel.virtual_pipeline_model_parallel_size=2",
        nodes=4,
    )
    assert virtual.time.bubble == pytest.approx(1.5 / (64 + 1.5))


def test_balanced_plans_gain_more_than_uniform_ones_on_stages():
    gains = {gain.law: gain for gain in plan("llama3.1_70b", nodes=4).gains}
    # 12 of 80 layers, three from each of four stages.
    assert gains["stage_balanced"].counted == pytest.approx(20 / 17)
    assert 1 < gains["uniform"].counted < gains["stage_balanced"].counted
    assert 1 < gains["uniform"].generation < gains["stage_balanced"].generation
    assert all(1 < gain.step < gain.generation for gain in gains.values())


def test_nothing_skipped_gains_nothing():
    assert plan("qwen2.5_math_7b", "nested.skip_ratio=0.0").gains == ()
    full = plan("qwen2.5_math_7b", "rollout.mode=full")
    assert full.gains == ()
    assert "nothing is skipped" in plan_report(full)


@pytest.mark.parametrize(
    ("name", "overrides", "nodes", "told"),
    [
        ("qwen2.5_math_7b", ["parallel.tensor_model_parallel_size=8"], 1, "num_attention_heads=28"),
        ("qwen2.5_math_7b", ["parallel.data_parallel_size=3"], 1, "parallel.data_parallel_size=3"),
        ("llama3.1_70b", [], 3, "does not divide the 24 processes"),
        ("qwen2.5_math_7b", ["rollout.prompts_per_step=3"], 1, "rollout.prompts_per_step=3"),
        ("qwen2.5_math_7b", ["train.max_tokens_per_micro_batch=9"], 1, "max_tokens_per_micro"),
        ("qwen2.5_math_7b", [], 0, "--nodes=0"),
    ],
)
def test_mistakes_name_the_option(name: str, overrides: list[str], nodes: int, told: str):
    with pytest.raises(UserError, match=told):
        plan(name, *overrides, nodes=nodes)


def test_the_shape_may_come_from_a_hugging_face_directory(tmp_path: Path):
    shape = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    overrides = ["model.architecture=null", f"model.hf_path={tmp_path}"]
    read = make_plan(load_config(example("qwen2.5_math_7b"), overrides), 1, 8)
    assert read.ranks == plan("qwen2.5_math_7b").ranks


def test_hardware_by_name_is_the_profile_of_that_name():
    config = load_config(example("qwen2.5_math_7b"))
    text = plan_report(make_plan(config, nodes=1, gpus_per_node=8, hardware="a100-80"))
    assert text == plan_report(make_plan(config, 1, 8, hardware=load_hardware("a100-80")))
    assert "TP 4 x PP 1 x DP 2" in text


def test_the_command_leaves_with_the_verdict(tmp_path: Path):
    config, record = str(example("qwen2.5_math_7b")), tmp_path / "plan.json"
    done = CliRunner().invoke(app, ["plan", config, "--json", str(record)])
    assert done.exit_code == 0
    written = json.loads(record.read_text())
    assert written["fits"]
    assert written["ranks"][0]["weights"] == 2 * written["ranks"][0]["parameters"]
    assert sum(
        written["seconds"][part] for part in ("generation", "logprobs", "update", "rest")
    ) == pytest.approx(written["seconds"]["step"])
    small = CliRunner().invoke(app, ["plan", config, "--gpu-memory", "24"])
    assert small.exit_code == 1
    wrong = CliRunner().invoke(app, ["plan", config, "--nodes", "1", "--gpus-per-node", "6"])
    assert wrong.exit_code == 2
    assert "parallel.tensor_model_parallel_size=4" in wrong.output
    unwritable = CliRunner().invoke(app, ["plan", config, "--json", str(tmp_path / "no" / "a")])
    assert unwritable.exit_code == 2
    assert "--json" in unwritable.output
