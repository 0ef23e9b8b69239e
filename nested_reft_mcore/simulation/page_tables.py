"""Tables and figures of a page that a program keeps up to date, each between its marks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError

_WIDTH = 115


@dataclass(frozen=True)
class Study:
    """A table, a figure where there is one, and what both assume."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    draw: Callable[[Any], None] | None = None
    note: str = ""
    """Stands above the table: made of what was simulated, so that it cannot say anything else."""


def study_text(study: Study) -> str:
    """Note and table as Markdown."""
    lines = [study.head, ["---"] * len(study.head), *study.rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{textwrap.fill(study.note, _WIDTH)}\n\n{table}" if study.note else table


def place_of(page: Path, name: str) -> re.Match[str]:
    """Where a study's table belongs. UserError where its marks are missing."""
    marks = f"<!-- simulated: {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"({re.escape(marks[0])}\n).*?({re.escape(marks[1])})", re.DOTALL)
    if not page.is_file():
        raise UserError(f"--page {page}: not found; expected a page such as docs/scaling.md")
    found = pattern.search(page.read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"{page}: expected the marks {marks[0]} and {marks[1]}")
    return found


def put_study(page: Path, name: str, study: Study) -> None:
    """Replace what stands between a study's marks. UserError as of `place_of`."""
    found = place_of(page, name)
    before, after = found.string[: found.end(1)], found.string[found.start(2) :]
    page.write_text(f"{before}{study_text(study)}\n{after}", encoding="utf-8")
