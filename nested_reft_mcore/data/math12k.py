"""Math12k: the MATH files without the 500 questions that MATH-500 evaluates on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.data import DataConfig, DataSource, PresetName
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.jsonl_writer import check_output_file, write_json_lines
from nested_reft_mcore.data.overlap import question_key
from nested_reft_mcore.data.rows import RowReader
from nested_reft_mcore.data.sources import read_rows


def write_math12k(train: str, test: str, math500: str, output: str | Path) -> tuple[int, int]:
    """Write the rows of both MATH files whose questions MATH-500 does not ask, as JSON lines.

    A line has `prompt`, `answer`, `demonstration`, `level`, `subject` and `source`; the preset
    `math12k` reads it. Returns how many rows were written and how many left out.

    Raises:
        UserError: a file cannot be read or written, or MATH-500 is not part of the MATH files.
    """
    check_output_file(output)
    held_out = {question_key(row["prompt"]) for row in _rows(math500, "math500")}
    rows = [*_rows(train, "math"), *_rows(test, "math")]
    found = {question_key(row["prompt"]) for row in rows} & held_out
    if len(found) < len(held_out):
        raise UserError(
            f"{math500}: {len(held_out) - len(found)} of its {len(held_out)} questions are neither "
            f"in {train} nor in {test}; expected all of them: these are not the files that "
            "MATH-500 was taken from"
        )
    kept = [row for row in rows if question_key(row["prompt"]) not in held_out]
    write_json_lines(output, kept)
    return len(kept), len(rows) - len(kept)


def _rows(path: str, preset: PresetName) -> Iterator[dict[str, Any]]:
    source = DataSource(path=path, preset=preset)
    reader = RowReader(source, DataConfig())
    for record in read_rows(source):
        row = {"prompt": reader.question(record), "answer": reader.answer(record)}
        if preset == "math":
            row["demonstration"] = reader.demonstration(record)
        yield row | dict(reader.labels(record)) | {"source": record.source}
