"""The study of docs/scaling.md: its tables land between their marks, and the page has them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.simulation.plan_gains import Mean, gains_by_step
from nested_reft_mcore.simulation.plot import save_figure
from nested_reft_mcore.simulation.simulate import Scenario, simulate

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "simulated_scaling.py"
PAGE = REPOSITORY / "docs" / "scaling.md"
SMALL = [
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=false",
    "nested.skip_ratio=0.25",
    "rollout.prompts_per_step=2",
    "rollout.max_new_tokens=64",
]
STUDIES = ("sizes", "stages", "tail", "laws", "erosion", "stragglers", "failures")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False
    )


def test_a_study_writes_the_table_that_the_page_has(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- simulated: erosion -->\nold\n<!-- end of erosion -->\nb\n")
    done = run("--only", "erosion", "--page", str(page), "--images", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("a", "b")
    assert "old" not in lines
    assert (tmp_path / "simulated_erosion.png").read_bytes().startswith(b"\x89PNG")
    committed = PAGE.read_text(encoding="utf-8")
    # What is committed is what the code says now.
    assert "\n".join(lines[1:-1]) in committed


def test_the_page_has_every_table():
    text = PAGE.read_text(encoding="utf-8")
    for name in STUDIES:
        start = text.index(f"<!-- simulated: {name} -->")
        end = text.index(f"<!-- end of {name} -->")
        assert text[start:end].count("\n| ") > 3, name


def test_a_page_without_marks_is_a_mistake(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    done = run("--only", "erosion", "--page", str(page), "--images", str(tmp_path))
    assert done.returncode == 2
    assert "expected the marks" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mean_over_plans_says_how_sure_it_is():
    found = Mean.of(np.asarray([1.0, 1.2, 1.4, 1.2]))
    # Deviation sqrt(0.08 / 3), of four plans.
    assert (found.value, found.error) == pytest.approx((1.2, (0.08 / 3) ** 0.5 / 2))
    assert found.text() == "1.20x ± 0.08"
    assert Mean.of(np.asarray([1.5])).error == 0
    with pytest.raises(ValueError, match="no values"):
        Mean.of(np.asarray([]))


def test_gains_are_step_by_step_and_of_the_same_completions():
    config = load_config(REPOSITORY / "examples" / "qwen2.5_math_7b" / "config.yaml", SMALL)
    base = Scenario(config, gpus_per_node=2, steps=3)
    full, nested = (simulate(base.changed({"rollout.mode": mode})) for mode in ("full", "nested"))
    found = gains_by_step(nested, full)
    assert found.shape == (3,)
    assert found[1] == full.steps[1].seconds["generation"] / nested.steps[1].seconds["generation"]
    # A quarter of the layers: 4 / 3 at most, and a little more where the head's stage loses more.
    assert ((found > 1.05) & (found < 1.4)).all()
    with pytest.raises(ValueError, match="same lengths"):
        gains_by_step(nested, simulate(base.changed(seed=1)))
    with pytest.raises(ValueError, match="same steps"):
        gains_by_step(nested, simulate(base.changed(steps=2)))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (OSError("encoder error -2 when writing image file"), "encoder error -2"),
        (OSError(), "OSError"),
    ],
)
def test_a_figure_that_cannot_be_written_says_why(error: OSError, told: str):
    class Figure:
        def savefig(self, *_: object, **__: object) -> None:
            raise error

    with pytest.raises(UserError, match=f"--plot /nope/x.png: cannot be written: {told}"):
        save_figure(Figure(), Path("/nope/x.png"), "--plot")
