"""Rows of data files, with errors that say where and what."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nested_reft_mcore.config.errors import UserError

SHOWN_CHARACTERS = 60
"""So much of a wrong row or value is shown in an error."""
_LOGGED_BROKEN_ROWS = 5

_log = logging.getLogger(__name__)


class BrokenRow(UserError):
    """A row that cannot be used, while others of its file can."""


class MissingField(BrokenRow):
    """A row lacks what it is read by; who knows why it is looked for says what to do."""


OnBroken = Callable[[BrokenRow], None]
"""What to do with a broken row: raise it, or count it and return."""


def refuse(error: BrokenRow) -> None:
    """End at the first broken row."""
    raise error


class BrokenRows:
    """Counts the broken rows of a source, and names the first of them in the log."""

    def __init__(self, told: OnBroken | None = None) -> None:
        """`told` hears of each in place of the log."""
        self._told = told
        self.count = 0
        self.first: BrokenRow | None = None

    def __call__(self, error: BrokenRow) -> None:
        """Note a row that is left out."""
        self.count += 1
        self.first = self.first or error
        if self._told is not None:
            self._told(error)
        elif self.count <= _LOGGED_BROKEN_ROWS:
            _log.warning("left out: %s", error)
        elif self.count == _LOGGED_BROKEN_ROWS + 1:
            _log.warning("further rows are left out; `nested-reft data check` counts them")


@dataclass(frozen=True)
class Record:
    """One row of a data file."""

    fields: dict[str, Any]
    source: str
    """`file:line`, lines counted from 1, or `file:row 5` where a row is no line."""

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null; `a.b` looks into an object, `a.0` into a list."""
        return self._find(key) is not None

    def text(self, key: str) -> str:
        """The string under `key`. BrokenRow if it is missing, not a string or not Unicode text."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        if not is_unicode(value):
            raise self.wrong(key, value, "text without lone surrogates")
        return value

    def number_or_text(self, key: str) -> str:
        """The number or string under `key`, as text. BrokenRow if it is anything else."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.wrong(key, value, "a number or a string")
        return self.text(key) if isinstance(value, str) else str(value)

    def array(self, key: str) -> list[Any]:
        """The list under `key`. BrokenRow if it is missing or something else."""
        value = self._get(key)
        if not isinstance(value, list):
            raise self.wrong(key, value, "a list")
        return value

    def wrong(self, key: str, value: object, expected: str) -> BrokenRow:
        """An error about the value under `key`, for the caller to raise."""
        return BrokenRow(f"{self.source}: field '{key}' is {shown(value)}; expected {expected}")

    def missing(self, *keys: str) -> MissingField:
        """An error that none of `keys` is there, for the caller to raise."""
        names = " or ".join(f"'{key}'" for key in keys)
        if any(key in self.fields for key in keys):
            return MissingField(f"{self.source}: field {names} is null; expected a value")
        return MissingField(f"{self.source}: no field {names}; found {sorted(self.fields)[:12]}")

    def find(self, key: str) -> Any:
        """The value under `key`, or None."""
        return self._find(key)

    def _get(self, key: str) -> Any:
        """The value under `key`. BrokenRow if it is missing or null."""
        value = self._find(key)
        if value is None:
            raise self.missing(key)
        return value

    def _find(self, key: str) -> Any:
        """The value under `key`, or None. A literal key with dots wins over a nested one."""
        if key in self.fields:
            return self.fields[key]
        value: Any = self.fields
        for part in key.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict):
                value = value.get(part)
            else:
                return None
        return value


def is_unicode(text: str) -> bool:
    r"""Whether `text` can be written as UTF-8: JSON's `\ud800` alone cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value as an error shows it: quoted, escaped and cut."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
