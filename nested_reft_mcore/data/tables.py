"""CSV, JSON and parquet files, row by row."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.jsonl import parse_json
from nested_reft_mcore.data.records import BrokenRow, OnBroken, Record, is_unicode, shown

_BATCH_ROWS = 512
_LARGEST_CSV_FIELD = 1 << 26
"""Characters. Python's own limit, 131,072, is below long worked answers."""


def read_csv(path: Path, on_broken: OnBroken) -> Iterator[Record]:
    """Rows of a CSV file with a header (tab-separated if it ends in .tsv), as text.

    A row's place is the line that it begins at. `on_broken` hears of rows with more or fewer fields
    than the header, or that are not UTF-8. UserError for a file that cannot be read, or without
    a header.
    """
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # What is not UTF-8 becomes lone surrogates, so that its row can be named.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, None)
            if not header:
                raise UserError(f"{path}: the data set is empty; expected a CSV file with a header")
            _check_header(path, header, delimiter)
            yield from _csv_rows(path, reader, header, on_broken)
    except csv.Error as error:
        raise UserError(f"{path}:1: not CSV: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read; expected CSV: {error.strerror}") from error


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    """Refuse a header of which a column would be lost, or that another character separates."""
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise UserError(
            f"{path}:1: {len(twice)} columns stand twice, {twice[0]!r} among them; "
            "expected each name once"
        )
    others = [mark for mark in ",;\t|" if mark in header[0] and mark != delimiter]
    if len(header) == 1 and others:
        raise UserError(
            f"{path}:1: one column, {shown(header[0])}, separated by {others[0]!r}; expected "
            f"{delimiter!r} between columns (a comma, or a tab where the name ends in .tsv)"
        )


def _csv_rows(path: Path, reader: Any, header: list[str], on_broken: OnBroken) -> Iterator[Record]:
    while True:
        source = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
            if row is None:
                return
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise BrokenRow(f"{source}: {len(row)} fields; expected {len(header)}, as line 1")
            if not all(map(is_unicode, row)):
                raise BrokenRow(f"{source}: not UTF-8; expected CSV")
        except csv.Error as error:
            on_broken(BrokenRow(f"{source}: not CSV: {error}"))
        except BrokenRow as error:
            on_broken(error)
        else:
            # An empty cell is what other formats call null.
            fields = {name: cell for name, cell in zip(header, row, strict=True) if cell != ""}
            yield Record(fields, source)


def read_json(path: Path, on_broken: OnBroken) -> Iterator[Record]:
    """Objects of a JSON file: a list of them, or an object that holds one list and nothing else.

    Places are counted from 1: `file:row 5`. `on_broken` hears of what is not an object. UserError
    for a file that cannot be read, or is something else.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        found = parse_json(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read; expected JSON: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    if not isinstance(found, list):
        raise UserError(f"{path}: found {shown(found)}; expected a list of JSON objects")
    yield from numbered(str(path), found, on_broken)


def read_parquet(path: Path, on_broken: OnBroken) -> Iterator[Record]:
    """Rows of a parquet file, a batch at a time. Places are counted from 1: `file:row 5`.

    UserError for a file that cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    def rows() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield from batch.to_pylist()

    try:
        yield from numbered(str(path), rows(), on_broken)
    except (pyarrow.ArrowException, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read; expected parquet: {first_line}") from error


def numbered(place: str, rows: Any, on_broken: OnBroken) -> Iterator[Record]:
    """Records of an iterable of mappings, called `place:row 1` and so on."""
    for number, row in enumerate(rows, start=1):
        source = f"{place}:row {number}"
        if isinstance(row, Mapping):
            yield Record(dict(row), source)
        else:
            on_broken(BrokenRow(f"{source}: found {shown(row)}; expected an object"))
