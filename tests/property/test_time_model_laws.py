"""What the model of time may never do, whatever machine, model and plan."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nested_reft_mcore
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.planning.hardware import Assumptions, HardwareProfile
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.lengths import LengthLaw
from nested_reft_mcore.planning.product_rate import DecodeProducts
from nested_reft_mcore.planning.step_time import StepModel
from nested_reft_mcore.planning.workload import workload_of

DEMO = Path(nested_reft_mcore.__file__).parents[1] / "examples" / "cpu_demo" / "config.yaml"
SHARES = st.lists(
    st.tuples(st.integers(1, 300), st.floats(0.01, 1.5)), max_size=6, unique_by=lambda pair: pair[0]
)


def profile(shares: tuple[tuple[float, float], ...] = (), **assumed: float) -> HardwareProfile:
    return HardwareProfile(
        name="x",
        memory_gb=10,
        peak_tflops=1,
        peak_tflops_float32=0.1,
        memory_gb_per_s=10,
        node_link_gb_per_s=2,
        network_gb_per_s=1,
        host_link_gb_per_s=5,
        product_shares=shares,
        busy_processes=2,
        busy_compute_share=0.8,
        busy_memory_share=0.7,
        assumptions=Assumptions(**assumed),
    )


def model(hardware: HardwareProfile, *overrides: str) -> StepModel:
    config = load_config(DEMO, overrides)
    stages = config.parallel.pipeline_model_parallel_size
    layout = Layout.of(model_architecture(config.model), config.parallel, 1, stages)
    workload = workload_of(config, layout, "cpu")
    return StepModel(config, layout, workload, hardware, workload.wanted_slots)


@given(SHARES, st.lists(st.floats(1, 1000), min_size=2, max_size=8))
def test_more_rows_never_take_less_time(shares: list[tuple[int, float]], rows: list[float]):
    products = DecodeProducts(profile(tuple(sorted(shares))), 4)
    seconds = [float(products.seconds(1e6 * count, count)) for count in sorted(rows)]
    assert all(one <= other * (1 + 1e-9) for one, other in pairwise(seconds))
    assert float(products.seconds(0.0, 0.0)) == 0.0


def test_measured_shares_give_the_measured_times():
    products = DecodeProducts(
        profile(
            ((1, 0.1), (8, 0.4), (64, 0.8)),
        ),
        4,
    )
    for rows, share in ((1, 0.1), (8, 0.4), (64, 0.8), (640, 0.8)):
        assert float(products.seconds(2e6, rows)) == pytest.approx(2e6 / (1e11 * share))


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(["prompts", "tokens", "fill", "layers", "samples"]),
    st.integers(1, 2),
    st.floats(0, 1.2),
)
def test_more_work_never_takes_less_time(what: str, stages: int, spread: float):
    fixed = [
        f"parallel.pipeline_model_parallel_size={stages}",
        "data.max_prompt_length=16",
        "rollout.max_slots=32",
    ]
    small = {"prompts": 8, "tokens": 16, "samples": 4, "layers": 12}
    large = small | ({what: 2 * small[what]} if what in small else {})
    fills = (0.3, 0.6) if what == "fill" else (0.4, 0.4)
    times = []
    for sizes, fill in ((small, fills[0]), (large, fills[1])):
        hardware = profile(
            ((1, 0.1), (64, 0.9)), response_fill=fill, length_spread=spread, pass_overhead_us=50
        )
        made = model(
            hardware,
            *fixed,
            f"rollout.prompts_per_step={sizes['prompts']}",
            f"rollout.max_new_tokens={sizes['tokens']}",
            f"rollout.group_size={sizes['samples']}",
            f"model.architecture.num_layers={sizes['layers']}",
            "train.micro_batch_size=4",
        )
        times.append(made.step([LayerSkipPlan.full(sizes["layers"])]))
    assert times[0].generation <= times[1].generation
    assert times[0].update <= times[1].update
    assert times[0].tokens <= times[1].tokens


def test_skipping_saves_and_the_fullest_stage_sets_the_pace():
    hardware = profile(((1, 0.1), (64, 0.9)), message_latency_us=0, layer_overhead_us=200)
    made = model(hardware, "data.max_prompt_length=1")
    full = made.decode.seconds(LayerSkipPlan.full(12))
    balanced = made.decode.seconds(LayerSkipPlan.parse("3,4,8,9", 12))
    lopsided = made.decode.seconds(LayerSkipPlan.parse("2,3,4,5", 12))
    assert balanced < lopsided <= full
    # The second stage is full; messages of no latency cost next to nothing.
    assert lopsided == pytest.approx(full, rel=0.03)


def test_processes_that_share_a_machine_are_slower():
    alone = profile()
    assert alone.crowded(1) is alone
    both, many = alone.crowded(2), alone.crowded(4)
    assert both.peak_tflops_float32 == pytest.approx(0.08)
    assert both.memory_gb_per_s == pytest.approx(7)
    # Four divide what two had used up.
    assert many.peak_tflops_float32 == pytest.approx(0.04)
    assert both.crowded(2) == both
    own = alone.model_copy(update={"busy_processes": 1})
    assert own.crowded(8).peak_tflops == own.peak_tflops


@settings(deadline=None)
@given(
    st.sampled_from(["lognormal", "exponential", "fixed"]),
    st.integers(20, 2000),
    st.floats(0.1, 0.9),
    st.floats(0.05, 1.2),
)
def test_quantiles_stand_for_their_law(kind: str, limit: int, fill: float, spread: float):
    law = LengthLaw(kind, max(2.0, fill * limit), limit, spread)  # type: ignore[arg-type]
    found = law.quantiles(500)
    assert (found[1:] >= found[:-1]).all()
    assert found[0] >= 1
    assert found[-1] <= limit
    assert found.mean() == pytest.approx(law.mean, rel=0.02, abs=0.6)
