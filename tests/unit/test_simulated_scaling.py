"""The study of docs/scaling.md: its tables land between their marks, and the page has them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "simulated_scaling.py"
PAGE = REPOSITORY / "docs" / "scaling.md"
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
