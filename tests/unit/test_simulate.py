"""`nested-reft simulate`: against the closed form, what it compares, its files, its mistakes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import nested_reft_mcore
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.cli import app
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.planning.hardware import load_hardware
from nested_reft_mcore.planning.skip_gain import skip_plans
from nested_reft_mcore.planning.step_time import StepModel
from nested_reft_mcore.simulation.report import simulation_record
from nested_reft_mcore.simulation.simulate import Scenario, Simulation, compare, simulate
from nested_reft_mcore.simulation.step import PARTS
from nested_reft_mcore.simulation.stragglers import Slow, Stragglers
from nested_reft_mcore.simulation.timeline import trace_events

EXAMPLES = Path(nested_reft_mcore.__file__).parents[1] / "examples"
SEVEN = EXAMPLES / "qwen2.5_math_7b" / "config.yaml"
SEVENTY = EXAMPLES / "llama3.1_70b" / "config.yaml"
SMALL = ("rollout.prompts_per_step=16", "rollout.max_new_tokens=512")


def scenario(path: Path, nodes: int, *overrides: str, **fields: Any) -> Scenario:
    fields = {"steps": 1, **fields}
    return Scenario(load_config(path, [*SMALL, *overrides]), nodes, **fields)


@pytest.fixture(scope="module")
def seventy() -> Simulation:
    return simulate(scenario(SEVENTY, 8, steps=2))


def test_one_stage_and_one_replica_is_the_closed_form():
    """With equal lengths and no prompts to speak of the roofline of means is exact."""
    hardware = load_hardware("h100", ["response_fill=1.0"])
    made = simulate(
        scenario(
            SEVEN,
            1,
            "rollout.prompts_per_step=8",
            "data.max_prompt_length=1",
            "train.max_tokens_per_micro_batch=null",
            gpus_per_node=4,
            lengths="fixed",
            hardware=hardware,
        )
    )
    run = made.run
    assert (run.layout.pipeline, run.layout.data) == (1, 1)
    model = StepModel(run.config, run.layout, run.workload, run.hardware, run.slots)
    closed = model.step([skip_plans(run.config, run.layout)[0]])
    parts = made.seconds
    assert parts["generation"] == pytest.approx(closed.generation, rel=2e-3)
    assert parts["logprobs"] == pytest.approx(closed.logprobs, rel=1e-3)
    assert parts["update"] + parts["optimizer"] == pytest.approx(closed.update, rel=1e-3)
    assert made.step_seconds[0] == pytest.approx(closed.total, rel=2e-3)
    assert made.waiting("generation")["inside"].max() == 0


@pytest.mark.parametrize("lengths", ["fixed", "lognormal"])
def test_more_stages_never_raise_the_ceiling(lengths: str):
    """Nor what is reached: stages divide the layers, and read weights for smaller slot groups."""
    made = [
        simulate(
            scenario(
                SEVENTY,
                4,
                f"parallel.pipeline_model_parallel_size={stages}",
                "rollout.max_slots=64",
                "rollout.max_num_batched_tokens=100000",
                "rollout.prompts_per_step=32",
                f"rollout.kv_cache_gb={40 / stages}",
                lengths=lengths,
                gpus_per_node=8 * stages // 4,
            )
        )
        for stages in (4, 8, 16)
    ]
    assert len({one.run.slots for one in made}) == 1
    assert all(one.run.layout.data == 1 for one in made)
    for one, other in pairwise(made):
        assert other.generation_ceiling <= one.generation_ceiling * (1 + 1e-9)
        assert other.generated_per_second_per_gpu <= one.generated_per_second_per_gpu
    for one in made:
        assert one.generated_per_second_per_gpu <= one.generation_ceiling


def test_tokens_out_are_tokens_asked_for(seventy: Simulation):
    for draw, step in zip(seventy.draws, seventy.steps, strict=True):
        rounds = draw.rounds
        decoded = (rounds.count[..., None] * rounds.rows).sum()
        written = (rounds.count[..., None] * rounds.piece_tokens).sum()
        assert decoded == draw.responses.sum() == step.response_tokens
        assert written == (draw.prompts - 1).sum()
        assert step.tokens == step.response_tokens + 8 * draw.prompts.sum()


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(seventy: Simulation):
    again = simulation_record(simulate(seventy.scenario))
    assert again == simulation_record(seventy)
    other = simulate(scenario(SEVENTY, 8, steps=2, seed=1))
    assert other.step_seconds != seventy.step_seconds


def test_lengths_do_not_depend_on_the_layout(seventy: Simulation):
    other = simulate(scenario(SEVENTY, 8, "parallel.pipeline_model_parallel_size=8", steps=2))
    for one, two in zip(seventy.draws, other.draws, strict=True):
        assert (one.responses == two.responses).all()


def test_every_second_of_every_stage_is_work_or_waiting(seventy: Simulation):
    for step in seventy.steps:
        whole = sum(step.summed(name) for name in ("busy", "waits_inside", "waits_outside"))
        assert np.asarray(whole) == pytest.approx(step.total)
        assert sum(step.seconds[name] for name in PARTS) == pytest.approx(step.total)


def test_comparisons_say_what_is_known(seventy: Simulation):
    found = {other.name: other for other in compare(seventy)}
    assert found["nothing skipped"].generation > 1
    assert found["plans by the law uniform"].generation > 1
    assert found["static batching"].generation >= 1
    assert found["all responses of the mean length"].generation < 1
    assert found["1 slot groups in flight, not 4"].generation > 1


def test_a_straggler_slows_everybody_and_waits_for_nobody(seventy: Simulation):
    slow = Stragglers(named=(Slow(1, 2, 2.0),))
    made = simulate(scenario(SEVENTY, 8, steps=2, stragglers=slow))
    assert made.step_seconds[0] > 1.4 * seventy.step_seconds[0]
    shares = made.waiting()
    whole = shares["inside"] + shares["outside"]
    assert whole.argmin() == 1 * 4 + 2
    assert shares["outside"][0].min() > 0.3


def test_a_trace_shows_one_thing_at_a_time_on_each_stage(seventy: Simulation):
    events = [event for event in trace_events(seventy) if event["ph"] == "X"]
    assert {"generation", "update", "forward", "backward", "decode", "lane 3"} <= {
        event["name"] for event in events
    }
    end_of_step = seventy.steps[0].total * 1e6
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for (replica, _), track in tracks.items():
        track.sort(key=lambda event: event["ts"])
        for one, other in pairwise(track):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-3 or replica < 0
        assert track[-1]["ts"] + track[-1]["dur"] <= end_of_step * (1 + 1e-9)


def test_a_thousand_gpus_take_seconds_only():
    made = simulate(scenario(SEVENTY, 128, "rollout.prompts_per_step=256"))
    assert made.run.layout.world_size == 1024
    assert made.waiting()["outside"].shape == (32, 4)


def test_full_depth_is_what_full_mode_simulates():
    full = scenario(SEVENTY, 4).changed({"rollout.mode": "full"})
    plan = skip_plans(full.config, simulate(full).run.layout)[0]
    assert plan == LayerSkipPlan.full(80)


def test_the_command_writes_all_it_is_asked_for(tmp_path: Path):
    files = [tmp_path / name for name in ("out.json", "trace.json", "plot.png")]
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("10\n300\n" + json.dumps({"token_ids": [1] * 40}) + "\n")
    arguments = ["simulate", str(SEVENTY), *SMALL, "--nodes", "8", "--steps", "2", "--compare"]
    arguments += ["--lengths", str(lengths), "--node-mtbf-hours", "1000", "--slow", "1:0=1.2"]
    for option, file in zip(("--json", "--trace", "--plot"), files, strict=True):
        arguments += [option, str(file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for text in ("step:", "waiting", "static batching", "no stragglers", "failures:", "Young"):
        assert text in done.output
    record = json.loads(files[0].read_text())
    assert record["lengths"]["law"] == "observed"
    assert record["factors"][1][0] == 1.2
    assert 0 < record["faults"]["useful_share"] < 1
    assert json.loads(files[1].read_text())["traceEvents"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batching", "both"], "--batching both: expected `continuous` or `static`"),
        (["--lengths", "normal"], "--lengths normal: no such file"),
        (["--length-spread", "-1"], "--length-spread -1"),
        (["--length-spread", "nan"], "--length-spread nan"),
        (["--slow", "9=x"], "--slow 9=x: expected REPLICA=FACTOR"),
        (["--slow", "7:9=2"], "there are replicas 0 to 0 of 4 stages"),
        (["--slow-factor", "0.5"], "--slow-factor 0.5: expected 1 or more"),
        (["--groups", "0"], "--groups 0: expected 1 or more"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--node-mtbf-hours", "0"], "--node-mtbf-hours 0"),
        (["--node-mtbf-hours", "9", "--restart-minutes", "nan"], "--restart-minutes nan"),
        # Nothing lives as long as it takes to come back.
        (["--node-mtbf-hours", "0.0001"], "which no checkpoint survives"),
        (["--node-mtbf-hours", "9", "checkpoint.interval=0"], "checkpoint.interval=0"),
        (["--nodes", "3"], "does not divide the 24 processes"),
        (["rollout.mode=speculative"], "rollout.mode=speculative is not simulated"),
    ],
)
def test_mistakes_name_the_option(arguments: list[str], told: str):
    given = ["simulate", str(SEVENTY), *SMALL, "--steps", "1", "--nodes", "4", *arguments]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    assert told in done.output
    assert "Traceback" not in done.output
