"""Rows of a data set, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nested_reft_mcore.config.data import DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.hub import read_hub
from nested_reft_mcore.data.jsonl import read_json_lines
from nested_reft_mcore.data.records import BrokenRows, OnBroken, Record, refuse
from nested_reft_mcore.data.tables import read_csv, read_json, read_parquet

_READERS = {
    "csv": read_csv,
    "json": read_json,
    "jsonl": lambda path, on_broken: read_json_lines(path, on_broken=on_broken),
    "parquet": read_parquet,
}
_FOREIGN = (
    (b"\x1f\x8b", "a gzip file", "unpack it with gunzip -k"),
    (b"PK\x03\x04", "a zip file", "unpack it with unzip"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with zstd -d"),
    (b"BZh", "a bzip2 file", "unpack it with bunzip2 -k"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it with xz -dk"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"PAR1", "a parquet file", "let its name end in .parquet, or say format: parquet"),
    (b"ARROW1", "an arrow file", "give its directory as hub:DIRECTORY, or write parquet"),
)
"""How files begin that are often given by mistake, what they are, and what to do."""
_ENDINGS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}


def read_rows(
    source: DataSource, limit: int | None = None, on_broken: OnBroken = refuse
) -> Iterator[Record]:
    """The rows of `source`, in order, the first `limit` or `source.limit` that can be read.

    Raises:
        UserError: the source is missing, is not of its format, or has no rows. Rows that cannot be
            read go to `on_broken`, which raises them by default.
    """
    limit = limit if source.limit is None else source.limit
    on_broken = broken = BrokenRows(on_broken)
    if source.path is None:
        rows = read_hub(source, on_broken)
    else:
        path = Path(source.path)
        if path.is_dir():
            raise UserError(
                f"{path}: is a directory and cannot be read as a file; expected its files as "
                "sources of their own, or `hub:` before it for a directory that `datasets` reads"
            )
        _refuse_binary(path, source.format)
        kind = find_format(path) if source.format == "auto" else source.format
        rows = _READERS[kind](path, on_broken)
    is_empty = True
    for record in islice(rows, limit):
        is_empty = False
        yield record
    if is_empty and broken.first is not None:
        raise UserError(f"{source.place}: no row can be read; the first broken one: {broken.first}")
    if is_empty:
        raise UserError(f"{source.place}: the data set is empty; expected at least one usable row")


def _refuse_binary(path: Path, given: str) -> None:
    """Refuse at once what would give one broken row after the other.

    Raises:
        UserError: says what the file is, and what to do with it.
    """
    if given == "parquet" or (given == "auto" and find_format(path) == "parquet"):
        return
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        # The format's own reader says so.
        return
    for magic, what, advice in _FOREIGN:
        if start.startswith(magic):
            raise UserError(f"{path}: is {what}; expected JSON lines, JSON or CSV: {advice}")
    if b"\0" in start:
        raise UserError(
            f"{path}: is a binary file; expected JSON lines, JSON or CSV as UTF-8 text, or parquet"
        )


def find_format(path: Path) -> str:
    """`csv`, `parquet`, `json` or `jsonl`, by the ending; a .json file that is a list is `json`."""
    ending = path.suffix.lower()
    if ending != ".json":
        return _ENDINGS.get(ending, "jsonl")
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError:
        return "json"
    return "json" if start.startswith(b"[") else "jsonl"
