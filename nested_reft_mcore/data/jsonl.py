"""JSON lines, row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.records import BrokenRow, OnBroken, Record, refuse, shown


def read_json_lines(
    path: str | Path, limit: int | None = None, on_broken: OnBroken = refuse
) -> Iterator[Record]:
    """Records of the first `limit` lines (blank ones do not count), one at a time.

    `on_broken` hears of lines that are not UTF-8, not JSON or not an object; by default the first
    one ends the reading. UserError for a file that is missing and, at the end, for a file without
    lines.
    """
    path = Path(path)
    count = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if limit is not None and count == limit:
                    return
                # Notepad and Excel begin a file with a byte-order mark.
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    count += 1
                    try:
                        record = _parse(text, f"{path}:{number}")
                    except BrokenRow as error:
                        on_broken(error)
                    else:
                        yield record
    except OSError as error:
        raise UserError(f"{path}: cannot be read; expected JSON lines: {error.strerror}") from error
    if count == 0:
        raise UserError(f"{path}: the data set is empty; expected one JSON object per line")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, a key stands twice in an object, or a number is not finite (NaN and
            Infinity are no JSON, though Python reads them).
        RecursionError: it is nested too deeply.
    """
    return json.loads(
        text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _parse(line: bytes, source: str) -> Record:
    """One line as a record; BrokenRow if it is not a JSON object in UTF-8."""
    try:
        fields = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BrokenRow(f"{source}: not UTF-8 ({error.reason}); expected JSON") from error
    except (ValueError, RecursionError) as error:
        found = shown(line.decode("utf-8").strip())
        raise BrokenRow(f"{source}: not JSON: found {found}; {error}") from error
    if not isinstance(fields, dict):
        raise BrokenRow(f"{source}: found {shown(fields)}; expected a JSON object")
    return Record(fields, source)
