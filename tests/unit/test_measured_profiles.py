"""From measured rates to a profile that `plan` reads; options of `bench hardware`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nested_reft_mcore.bench.hardware_profile import draft_profile, nearest_built_in, row_shares
from nested_reft_mcore.bench.hardware_report import hardware_report
from nested_reft_mcore.bench.hardware_results import HardwareResults, Sharing
from nested_reft_mcore.bench.link_rates import LinkRate
from nested_reft_mcore.bench.memory_rates import MemoryRate, matrix_vector
from nested_reft_mcore.bench.products import ProductRate, measure_products, sizes_for
from nested_reft_mcore.bench.timing import Measured, seconds_of
from nested_reft_mcore.config.bench_hardware import BenchHardwareOptions, check_bench_hardware
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.planning.hardware import BUILT_IN, load_hardware

CPU = torch.device("cpu")


def near(value: float) -> Measured:
    return Measured(value, 0.9 * value, 1.1 * value)


def product(kind: Any, rows: int, rate: float, dtype: str = "float32") -> ProductRate:
    return ProductRate(kind, dtype, rows, 576, 1536, "torch", near(rate))


def link(place: Any, what: str, size: int, seconds: float, rate: float) -> LinkRate:
    return LinkRate(place, what, 2, size, near(seconds), near(rate))


def results(**changes: Any) -> HardwareResults:
    """Two processes on a machine without a GPU."""
    found: dict[str, Any] = {
        "device": "cpu",
        "device_name": "Some Processor",
        "device_bytes": 12 * 10**9,
        "host_bytes": 24 * 10**9,
        "processes": 2,
        "nodes": 1,
        "threads": 1,
        "products": (
            product("square", 2048, 1e11),
            product("decode", 1, 5e9),
            product("decode", 8, 3.2e10),
            product("decode", 64, 8e10),
            product("update", 1024, 9e10),
        ),
        "memory": (
            MemoryRate("matrix times vector", 2**28, near(9e9)),
            MemoryRate("copy", 2**29, near(1.2e10)),
        ),
        "sharing": Sharing(2, near(0.95), near(0.8)),
        "links": (
            link("node", "all-reduce", 8, 2e-4, 4e4),
            link("node", "all-reduce", 2**24, 2e-2, 8e8),
            link("node", "message", 8, 1e-4, 8e4),
            link("node", "message", 2**24, 1e-2, 1.6e9),
        ),
        "environment": {"time": "2026-11-26T00:00:00Z"},
    }
    return HardwareResults(**(found | changes))


def test_a_profile_loads_and_has_what_was_measured(tmp_path: Path):
    draft = draft_profile(results())
    path = tmp_path / "mine.yaml"
    path.write_text(draft.to_yaml("mine"))
    read = load_hardware(str(path))
    assert read == draft.profile("mine")
    assert read.peak_tflops_float32 == 0.1
    assert read.product_shares == ((1, 0.05), (8, 0.32), (64, 0.8))
    assert (read.memory_gb_per_s, read.node_link_gb_per_s) == (12, 1.6)
    assert (read.busy_processes, read.busy_compute_share, read.busy_memory_share) == (2, 0.95, 0.8)
    assert (read.memory_gb, read.host_memory_gb, read.kernels) == (12, 24, "cpu")
    assumed = read.assumptions
    assert (assumed.matmul_efficiency, assumed.decode_efficiency) == (0.9, 0.75)
    assert (assumed.all_reduce_latency_us, assumed.message_latency_us) == (200, 100)
    assert assumed.link_efficiency == 0.5


def test_what_was_not_measured_is_a_built_in_value_and_says_so():
    draft = draft_profile(results())
    assert draft.profile("x").network_gb_per_s == BUILT_IN["h100"].network_gb_per_s
    text = draft.to_yaml("x")
    line = next(row for row in text.splitlines() if row.startswith("network_gb_per_s"))
    assert "NOT MEASURED (one node): the built-in value of h100" in line
    # Other files that are made of this one say it too.
    assert "not measured, of h100: network_gb_per_s" in draft.profile("x").source
    line = next(row for row in text.splitlines() if row.startswith("peak_tflops:"))
    assert "0.1 " in line
    assert "NOT MEASURED (bfloat16 was left out): that of float32" in line
    assert "--quick" not in text
    assert "--quick, at sizes that measure little" in draft_profile(results(quick=True)).to_yaml(
        "x"
    )
    told = hardware_report(results(), draft)
    assert "network_gb_per_s 50: NOT MEASURED" in told
    alone = results(processes=1, sharing=None, links=())
    told = hardware_report(alone, draft_profile(alone))
    assert "node_link_gb_per_s 450: NOT MEASURED (one process on the node)" in told
    assert draft_profile(alone).profile("x").busy_processes == 1


def test_two_nodes_of_gpus_have_their_network_and_their_own_type_of_numbers():
    """Written by hand: no such machine was measured."""
    products = (product("square", 8192, 7e14, "bfloat16"), product("square", 8192, 5e13))
    products += (product("decode", 1, 2e12, "bfloat16"), product("update", 8192, 6e14, "bfloat16"))
    made = results(
        device="cuda",
        device_name="NVIDIA A100-SXM4-80GB",
        processes=16,
        nodes=2,
        products=products,
        memory=(
            MemoryRate("matrix times vector", 2**29, near(1.6e12)),
            MemoryRate("copy", 2**30, near(1.5e12)),
            MemoryRate("from the host", 2**29, near(2.5e10)),
        ),
        links=(
            *results().links,
            link("network", "message", 2**28, 1e-2, 2e10),
            link("network", "all-reduce", 2**28, 2e-2, 1.8e10),
        ),
    )
    draft = draft_profile(made)
    profile = draft.profile("two")
    assert (profile.peak_tflops, profile.peak_tflops_float32) == (700, 50)
    assert profile.assumptions.matmul_efficiency == pytest.approx(6 / 7, rel=1e-3)
    assert profile.network_gb_per_s == 20
    assert (profile.host_link_gb_per_s, profile.kernels) == (25, "fused")
    assert not draft.guesses
    assert nearest_built_in(made.device_name) == "a100-80"


def test_shares_never_let_more_rows_take_less_time():
    noisy = results(
        products=(
            product("square", 2048, 1e11),
            product("decode", 8, 1e9),
            product("decode", 16, 1.5e11),
            product("decode", 32, 9e10),
            product("update", 1024, 1e11),
        )
    )
    shares = row_shares(noisy)
    assert [rows for rows, _ in shares] == [8, 16, 32]
    times = [rows / share for rows, share in shares]
    assert all(later >= earlier * 0.999 for earlier, later in pairwise(times))


def test_products_are_measured_with_the_operations_that_they_have():
    found = measure_products(sizes_for(CPU, quick=True), torch.float32, CPU, 1)
    assert [p.kind for p in found] == ["square", "decode", "decode", "decode", "update"]
    assert all(1e6 < p.rate.median < 1e14 for p in found)
    action, read = matrix_vector(2**16, CPU)
    assert read == 4 * 128 * 128
    assert torch.equal(action(), torch.full((128,), 128.0))


def test_rounds_have_the_number_of_calls_that_was_stated():
    calls = []
    seconds = seconds_of(lambda: calls.append(0), CPU, 3, 7)
    assert len(calls) == 1 + 3 * 7
    assert len(seconds) == 3
    spread = Measured.of([2.0, 1.0, 4.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 4.0)
    rate = spread.per_second(8.0)
    assert (rate.median, rate.low, rate.high) == (4.0, 2.0, 8.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": "mine.json"}, r"--output mine.json: expected a name that ends in .yaml"),
        ({"output": "/nowhere/at/all.yaml"}, "--output /nowhere/at/all.yaml: its directory"),
        ({"json_file": "/nowhere/at/all.json"}, "--json /nowhere/at/all.json: its directory"),
        ({"dtypes": "float16"}, "--dtypes float16: expected auto, or some of float32, bfloat16"),
        ({"dtypes": ","}, "--dtypes ,: expected auto"),
    ],
)
def test_options_that_cannot_be(given: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        check_bench_hardware(BenchHardwareOptions(**given))


def test_quick_takes_few_rounds_and_dtypes_follow_the_device():
    assert BenchHardwareOptions(quick=True).num_rounds == 2
    assert BenchHardwareOptions(rounds=9).num_rounds == 9
    options = BenchHardwareOptions()
    assert options.dtype_names("cpu") == ("float32",)
    assert options.dtype_names("cuda") == ("float32", "bfloat16")
    assert BenchHardwareOptions(dtypes="bfloat16").dtype_names("cpu") == ("bfloat16",)
