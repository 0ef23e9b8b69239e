"""Profiles of machines: built in, from files, with assumptions replaced."""

from pathlib import Path

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.planning.hardware import BUILT_IN, load_hardware


def test_built_in_profiles_say_where_their_figures_come_from():
    assert set(BUILT_IN) == {"a100-80", "h100", "h200"}
    for name, profile in BUILT_IN.items():
        assert load_hardware(name) == profile
        assert "data sheet" in profile.source


def test_assumptions_are_replaced_by_name():
    profile = load_hardware("h100", ["matmul_efficiency=0.3", "reserve_gb=5"])
    assert profile.assumptions.matmul_efficiency == 0.3
    assert profile.assumptions.reserve_gb == 5
    assert profile.peak_tflops == BUILT_IN["h100"].peak_tflops


def test_a_file_changes_a_built_in_profile(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: a100-80\nmemory_gb: 40\nassumptions:\n  response_fill: 0.7\n")
    profile = load_hardware(str(path), ["prompt_fill=0.5"])
    assert (profile.name, profile.memory_gb) == ("mine", 40)
    assert profile.peak_tflops == BUILT_IN["a100-80"].peak_tflops
    assert (profile.assumptions.response_fill, profile.assumptions.prompt_fill) == (0.7, 0.5)
    assert profile.assumptions.decode_efficiency == 0.6


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: h101\n", "h101"),
        ("base: h100\nmemory: 40\n", "memory_gb"),
        ("base: h100\nmemory_gb: -1\n", ":2"),
        ("memory_gb: 40\n", "peak_tflops"),
        ("base: h100\nassumptions: 3\n", "assumptions"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, told: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        load_hardware(str(path))


@pytest.mark.parametrize(
    ("name", "assumptions", "told"),
    [
        ("v100", [], "a100-80, h100, h200"),
        ("h100", ["matmul_eficiency=0.3"], "matmul_efficiency"),
        ("h100", ["matmul_efficiency=3"], "matmul_efficiency"),
        ("h100", ["matmul_efficiency"], "expected"),
        ("absent.yaml", [], "absent.yaml"),
    ],
)
def test_mistakes_on_the_command_line_are_named(name: str, assumptions: list[str], told: str):
    with pytest.raises(UserError, match=told):
        load_hardware(name, assumptions)
