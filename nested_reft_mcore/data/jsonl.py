"""JSON lines with errors that say where and what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError

SHOWN_CHARACTERS = 60
"""So much of a wrong line or value is shown in an error."""


@dataclass(frozen=True)
class Record:
    """One line of a JSON lines file."""

    fields: dict[str, Any]
    source: str
    """`file:line`, lines counted from 1."""

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null; `a.b` looks into the object under `a`."""
        return self._find(key) is not None

    def text(self, key: str) -> str:
        """The string under `key`. UserError if it is missing, not a string or not Unicode text."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        if not is_unicode(value):
            raise self.wrong(key, value, "text without lone surrogates")
        return value

    def number_or_text(self, key: str) -> str:
        """The number or string under `key`, as text. UserError if it is anything else."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.wrong(key, value, "a number or a string")
        return self.text(key) if isinstance(value, str) else str(value)

    def array(self, key: str) -> list[Any]:
        """The list under `key`. UserError if it is missing or something else."""
        value = self._get(key)
        if not isinstance(value, list):
            raise self.wrong(key, value, "a list")
        return value

    def wrong(self, key: str, value: object, expected: str) -> UserError:
        """An error about the value under `key`, for the caller to raise."""
        return UserError(f"{self.source}: field '{key}' is {_shown(value)}; expected {expected}")

    def _get(self, key: str) -> Any:
        """The value under `key`. UserError if it is missing or null."""
        value = self._find(key)
        if value is None:
            raise UserError(
                f"{self.source}: no field '{key}'; found {sorted(self.fields)[:12]}; set the "
                "data.*_field option that names it, or correct the line"
            )
        return value

    def _find(self, key: str) -> Any:
        """The value under `key`, or None. A literal key with dots wins over a nested one."""
        if key in self.fields:
            return self.fields[key]
        value: Any = self.fields
        for part in key.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(part)
        return value


def is_unicode(text: str) -> bool:
    r"""Whether `text` can be written as UTF-8: JSON's `\ud800` alone cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_json_lines(path: str | Path, limit: int | None = None) -> Iterator[Record]:
    """Records of the first `limit` lines (blank ones do not count), one at a time.

    UserError for a file that is missing, a line that is not UTF-8, not JSON or not an object, and,
    at the end, for a file without lines.
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
                    yield _parse(text, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read; expected JSON lines: {error.strerror}") from error
    if count == 0:
        raise UserError(f"{path}: the data set is empty; expected one JSON object per line")


def _parse(line: bytes, source: str) -> Record:
    """One line as a record; UserError if it is not a JSON object in UTF-8."""
    try:
        fields = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 ({error.reason}); expected JSON") from error
    except (ValueError, RecursionError) as error:
        found = _shown(line.decode("utf-8").strip())
        raise UserError(f"{source}: not JSON: found {found}; {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{source}: found {_shown(fields)}; expected a JSON object")
    return Record(fields, source)


def _refuse_constant(name: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(f"{name} is not a JSON value")


def _shown(value: object) -> str:
    """A value as an error shows it: quoted, escaped and cut."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
